"""Train a recommender: config -> data, embeddings, model, trainer. The composition root and only importer of hydra.

python train.py embedding=hashed compression=0.1
"""

import contextlib
import errno
import functools
import gc
import hashlib
import inspect
import json
import math
import os

# Before torch starts its threads: a waiting thread sleeps instead of spinning. On an idle machine that costs little;
# beside other processes spinning costs most of the speed (2 cores, one of them busy: 14,000 against 95,000 samples/s).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic=true needs of cuBLAS

import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import hydra
import torch
from hydra._internal.utils import get_args
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.resident import Resident
from dlrm import jobs, linear
from dlrm.backends import Backends
from dlrm.best import BestWeights
from dlrm.checkpoints import CheckpointSettings
from dlrm.log import RunLog
from dlrm.memory import keep_heap, needs, reset_peak
from dlrm.plan import facts, fuses, hparams, print_plan, say_what_is_replaced
from dlrm.refusals import (
    CONF,
    ConfigError,
    check_choices,
    check_keys,
    check_number,
    check_types,
    explain,
    near,
    some,
)
from dlrm.resume import CONFIG, check_not_over, find_start, identity, keep_config, rows_to_keep
from dlrm.root import check_root
from dlrm.run_folder import HELD, config_hash, held, make_run_folder
from dlrm.settings import TrainerSettings
from dlrm.trainer import Trainer
from embeddings import EmbeddingBags, native, seed_of
from embeddings.backend import Backend


def main() -> int:
    """Run the command line. Returns the exit status: 0, 1 if training failed, 2 if it was refused, 128 + a signal."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises, and the message below is ours
    arguments = sys.argv[1:]
    named = [argument.partition("=")[2] for argument in arguments if argument.startswith("sweep=")]
    try:
        check_choices(arguments)
        if named:
            return sweep(named[-1], arguments)
        folder = check_folder(arguments)
        if is_multirun(arguments):
            return several(arguments)
        with refused_without_a_trace(folder):
            run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
    except (FloatingPointError, OSError) as error:  # diverged, or a disk that is full or not ours to write
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        return 128 + interrupted.args[0]
    except KeyboardInterrupt:
        return 130
    else:
        return 0
    finally:
        gc.collect()  # once more at exit frees what an error left half-way, or duckdb lists all its types as leaked
    return 2


def sweep(name: str, given: list[str]) -> int:
    """Run the missing jobs of conf/sweep/<name>.yaml, then the report. Returns 1 if any job is without a result."""
    if not is_multirun(given):
        raise ConfigError(f"sweep={name} is many runs: python train.py -m sweep={name}")
    if any(jobs.key_of(argument) == "hydra/sweeper" for argument in given):
        raise ConfigError(f"sweep={name} says which jobs there are, so it takes no hydra/sweeper")
    from dlrm.sweep_report import report  # only here: it imports what training does not need

    folder = jobs.sweep_folder(name, given)
    grids = jobs.grids(name, given)
    num_jobs = 0
    for line in grids:
        try:
            num_jobs += count_jobs(line)
        except (HydraException, OmegaConfBaseException) as error:
            own = " ".join(word for word in line if word not in given)
            raise ConfigError(f"sweep={name}: its grid {own} cannot be had: {explain(error)}") from error
    print(f"sweep {name}: {num_jobs} jobs in {folder}; the same command again runs only those without a result")
    jobs.announce(folder, num_jobs)
    status = 0
    for line in grids:
        status |= launch(line, folder)
    return status | report(folder) if any(folder.glob("*/.hydra")) else status


def count_jobs(given: list[str]) -> int:
    """How many jobs hydra makes of a command line, by its own reading of it. Raises HydraException as it would, also
    where the first of them cannot be composed."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        overrides = parser.parse_overrides([word for word in given if "=" in word and not word.startswith("-")])
        last = {override.get_key_element(): override for override in overrides}
        hydra.compose("config", [first_of(override) for override in last.values()])
    return math.prod(sum(1 for _ in o.sweep_string_iterator()) for o in last.values() if o.is_sweep_override())


def first_of(override: Override) -> str:
    """The override, or of those that it makes in a sweep the first."""
    if not override.is_sweep_override():
        return override.input_line
    if (first := next(override.sweep_string_iterator(), None)) is None:
        raise ConfigError(f"{override.input_line}: names nothing that there is")
    return f"{override.get_key_element()}={first}"


def is_multirun(given: list[str]) -> bool:
    return not {"-m", "--multirun"}.isdisjoint(given)


def several(given: list[str]) -> int:
    """Run the jobs of -m, in this process or a launcher's, then name those without a result. Returns 1 if any is."""
    from dlrm.sweep import list_missing, read_runs  # only here: it imports what training does not need

    folder = jobs.said_folder(given) or make_run_folder(f"multirun/{datetime.now():%Y-%m-%d/%H-%M-%S}")
    try:
        status = launch(given, folder)
    finally:
        with contextlib.suppress(OSError):  # it is empty: --help, --cfg, a launcher that is not to be had
            folder.rmdir()
    if not any(folder.glob("*/.hydra")):
        return status
    if missing := list_missing(read_runs(folder)):
        print(missing, file=sys.stderr)
    return status or int(bool(missing))


def launch(given: list[str], folder: Path) -> int:
    """Run the jobs of a command line. Returns 1 if the launcher fails: it lost a process, or was not to be had."""
    rest = [argument for argument in given if argument not in ("-m", "--multirun")]
    sys.argv = [sys.argv[0], "-m", *rest, f"hydra.sweep.dir='{folder}'"]  # hydra wants its overrides side by side
    try:
        run()
    except (RuntimeError, ValueError) as error:  # or a search is without one trial; the jobs' own are in error.txt
        if isinstance(error, OmegaConfBaseException):
            raise
        print(f"error: {(str(error) or type(error).__name__).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


BEFORE_A_RUN = (CONFIG, HELD)  # files that are in a run's folder, beside .hydra, before its first record


class Busy(ConfigError):
    """Another process trains in the run's folder."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to end by the signal of this number, and has."""


def run_folder(resume: str | None, path: str) -> str:
    """${run_folder:RESUME,PATH} in the config: creates the folder, with a suffix if it is taken.

    Under resume=auto it is the same for the same command."""
    if resume != "auto":
        return str(make_run_folder(path))
    others = (argument for argument in sys.argv[1:] if jobs.key_of(argument) not in ("resume", "resume_despite"))
    command = "\n".join(others)
    folder = Path("runs") / f"auto-{hashlib.sha256(command.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


@contextlib.contextmanager
def refused_without_a_trace(folder: Path | None) -> Iterator[None]:
    """In the folder of a run that may go on: if it is refused, .hydra is as it was before hydra came."""
    before = {file: file.read_bytes() for file in folder.glob(".hydra/*")} if folder is not None else {}
    try:
        yield
    except (ConfigError, HydraException, OmegaConfBaseException):
        for file, content in before.items():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
        raise


# here and not in main: a launcher's processes import this module and call `run`
keep_heap()
# cached: hydra asks for the folder more than once, and must get the same one
OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)
OmegaConf.register_new_resolver("job_folder", jobs.job_folder, replace=True)


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def run(composed) -> float | None:
    """One run, in the folder that hydra made for it. Returns what a search maximises: the AUC of `run_once`."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    config = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    if config.pop("sweep", None) is not None:
        return run_job(config, folder)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return attempt(config, folder)
    try:
        return run_once(config, folder)
    except Busy:  # the folder is another process's
        raise
    except (ConfigError, KeyboardInterrupt):
        if not (folder / "metrics.jsonl").exists():  # nothing but the config: leave no folder behind
            shutil.rmtree(folder / ".hydra", ignore_errors=True)
            for name in BEFORE_A_RUN:
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def run_job(config: dict, folder: Path) -> None:
    """One job of a named sweep: unless it has its result, or another process is at it."""
    with jobs.claim(folder) as is_ours:
        if not is_ours:
            print(f"{folder.name}: another process is at it")
        elif has_result(config, folder):
            print(f"{folder.name}: has its result")
        else:
            if config["resume"] != "auto":
                jobs.set_aside(folder)
            print(f"\n{jobs.progress(folder.parent)}: {folder.name}", flush=True)
            attempt(config, folder)


def attempt(config: dict, folder: Path) -> float | None:
    """One job of many: what stops it is kept in error.txt, and the others go on."""
    searches = is_search()
    try:
        return run_once(config, folder)
    except Exception as error:
        print(f"{folder.name} FAILED: {error}", file=sys.stderr)
        with contextlib.suppress(OSError):  # a full disk
            (folder / "error.txt").write_text(f"{type(error).__name__}: {error}\n")
            (folder / "traceback.txt").write_text(traceback.format_exc())
        if searches:
            raise  # hydra.sweeper.max_failure_rate says whether the others go on
    return None


def run_once(config: dict, folder: Path) -> float | None:
    """Train in a folder of its own. Returns eval/auc of the last weights, on the validation split if there is one."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(folder))
        except ValueError as error:
            raise Busy(str(error)) from error
        if config["resume"] == "auto" and has_result(config, folder):
            summary = json.loads((folder / "summary.json").read_text())
            if summary["checkpoint_error"] is None:
                print(f"{folder}: this run has its result, of step {summary['steps']:,}")
                return summary["last"]["eval/auc"]
        try:
            summary = train(config, folder)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(f"{error}; {folder}: the disk has {shutil.disk_usage(folder).free:,} bytes free") from error
    if summary["status"] == "interrupted":
        raise Interrupted(summary["signal"])  # ends a sweep too
    if summary["checkpoint_error"] is not None and HydraConfig.get().mode == RunMode.RUN:
        raise OSError(f"the results are there, but no checkpoint of the last weights: {summary['checkpoint_error']}")
    return summary["last"]["eval/auc"]


def has_result(config: dict, folder: Path) -> bool:
    """Whether a folder has this run's result. Raises ConfigError if it has that of another configuration or data."""

    def fingerprint() -> str:
        with refusals():
            return build("data", config["data"]).fingerprint

    key = "hydra.run.dir" if HydraConfig.get().mode == RunMode.RUN else "hydra.sweep.dir"
    return jobs.is_completed(folder, config_hash(config), fingerprint, key=key)


def is_search() -> bool:
    """Whether hydra's sweeper chooses runs by what `run` returns. Raises ConfigError if it would minimise that."""
    direction = HydraConfig.get().sweeper.get("direction") if HydraConfig.initialized() else None
    if direction is not None and (said := getattr(direction, "name", direction)) != "maximize":
        raise ConfigError(f"hydra.sweeper.direction={said}: runs are judged by eval/auc, so it must be maximize")
    return direction is not None


class Parts(NamedTuple):
    """What a configuration names, and the checkpoint that its run goes on from."""

    settings: TrainerSettings
    library: str  # of the dense layers: see dlrm.linear
    dataset: object
    backends: Backends
    make_model: Callable
    make_dense: Callable  # the optimizers
    make_embedding: Callable
    start: Path | None


def train(config: dict, folder: Path) -> dict:
    """Build everything that `config` names, train, return the summary.

    Raises ConfigError, before any row is read for whatever can be told without: all but the ratios out of reach.
    """
    with refusals():
        parts = check(config, folder)
        chosen = choose_backends(parts)
        bags, embedding_optimizer, fused = make_embeddings(config, parts, chosen)
        torch.manual_seed(seed_of(config["seed"], "model"))
        model = parts.make_model(bags, len(parts.dataset.dense_names)).to(config["device"])
        linear.use(model, parts.library)
        log = open_log(config, folder, parts, {"linear": parts.library, "fused": fused})
    say_what_is_replaced(bags, config)
    with refusals():
        trainer = Trainer(
            model,
            Resident(parts.dataset, config["device"]) if config["data_on_device"] else parts.dataset,
            dense_optimizer=parts.make_dense(model.dense_parameters()),
            embedding_optimizer=embedding_optimizer,
            settings=parts.settings,
            log=log,
            identity=identity(config),
        )
        if parts.start is not None:
            trainer.resume(parts.start, config["resume_despite"])
    return trainer.train()


def check(config: dict, folder: Path) -> Parts:
    """What a configuration names, judged as far as that goes without reading a row."""
    check_root(config)
    if config["deterministic"]:
        linear.repeat_with_any_threads()
    check_keys("trainer", TrainerSettings, {**config["trainer"]})
    check_keys("checkpoint", CheckpointSettings, {**config["checkpoint"]})
    settings = trainer_settings(config)
    if (config["expected"] or {}).get("at_best") and not (settings.eval_every and settings.keep_best):
        raise ConfigError("expected.at_best=true: needs trainer.eval_every above 0 and trainer.keep_best=true")
    library = linear.choose(config["linear"], device=config["device"], precision=config["precision"])
    if not reset_peak(config["device"]):
        print("memory/peak_bytes is since the process began: this system cannot restart it")
    dataset = build("data", config["data"])
    make_model = build("model", config["model"])
    backends = backends_of(config, dataset.feature_names)
    if settings.average_from is not None:
        backends.refuse_16_bits(f"trainer.average_from={settings.average_from}: the mean would be rounded away")
    make_dense, make_embedding = optimizers(config["optimizer"], config["device"])
    backends.refuse_auto(make_embedding([torch.zeros(1, 1)]))
    stand_in = backends.stand_in(dataset.feature_names, pooling=config["pooling"], seed=config["seed"])
    make_model(stand_in, len(dataset.dense_names))
    start = find_start(config, folder, dataset.fingerprint)
    native.load(config["native"])
    return Parts(settings, library, dataset, backends, make_model, make_dense, make_embedding, start)


def choose_backends(parts: Parts) -> dict[str, Backend]:
    """Each feature's backend. The data are prepared for it, and what these alone tell is judged."""
    dataset, backends = parts.dataset, parts.backends
    dataset.prepare(backends.take_any_id(dataset.feature_names))
    if parts.start is not None:
        check_not_over(parts.start, parts.settings.num_steps(dataset.num_samples["train"]))
    chosen = backends.choose(dataset.cardinalities)
    dataset.prepare({feature for feature, backend in chosen.items() if not backend.ranged})
    if is_search() and not dataset.num_samples["valid"]:
        raise ConfigError("hydra.sweeper: a search is judged on the validation split, and this data has none")
    return chosen


def make_embeddings(
    config: dict, parts: Parts, chosen: dict[str, Backend]
) -> tuple[EmbeddingBags, torch.optim.Optimizer, bool]:
    """The embeddings, their optimizer, and whether it steps in their backward pass, as what they take is said."""
    rows, how = parts.dataset.cardinalities, {"pooling": config["pooling"], "seed": config["seed"]}
    planned = EmbeddingBags(chosen, rows, **how, device="meta")
    planned_optimizer = parts.make_embedding(planned.parameters())
    fused = fuses(config, planned, planned_optimizer)
    if fused:
        planned.fuse(planned_optimizer)
    averages = parts.settings.average_from is not None
    needed = needs(planned, planned_optimizer, parts.settings.batch_size, averages=averages)
    print_plan(parts.dataset, planned, needed)
    bags = EmbeddingBags(chosen, rows, **how).to(config["device"])
    optimizer = parts.make_embedding(bags.parameters())
    if fused:
        bags.fuse(optimizer)
    return bags, optimizer, fused


def open_log(config: dict, folder: Path, parts: Parts, known: dict) -> RunLog:
    """The run's records, those that its checkpoint has seen kept, and its configuration. known: for its summary."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    known = facts(config) | known | {"samples_fingerprint": samples_fingerprint(config["data"], parts.dataset)}
    after = rows_to_keep(folder, parts.start) if config["resume"] == "auto" else None
    keep_config(folder, OmegaConf.to_yaml(OmegaConf.create(config)), parts.start)
    log = RunLog(folder, facts=known, hparams=hparams(config, choices), after=after)
    if parts.start is None:  # of a run that ended before its first checkpoint
        BestWeights(folder / "checkpoints").remove()
    return log


def trainer_settings(config: dict) -> TrainerSettings:
    """The trainer's settings by a configuration. Raises ValueError, naming the key."""
    root = {key: config[key] for key in ("precision", "device", "deterministic")}
    return TrainerSettings(**config["trainer"], checkpoint=CheckpointSettings(**config["checkpoint"]), **root)


def backends_of(config: dict, feature_names: list[str]) -> Backends:
    """Which backend each feature gets, by a configuration. Says of which of them compression is not."""
    default, named = backend("embedding", config["embedding"]), {}
    for name, node in config["features"].items():
        if name not in feature_names:
            raise ConfigError(
                f"features names no column {name!r}; data has {some(feature_names)}" + near(name, feature_names)
            )
        if not isinstance(node, dict):
            raise ConfigError(f"features.{name}={node}: give it a backend: +embedding@features.{name}=hashed")
        # without a backend of its own, a feature adjusts the default's hyperparameters
        own = node if "_target_" in node else config["embedding"] | node
        named[name] = backend(f"features.{name}", own)
    backends = Backends(default, named, config["dense_below"])
    backends.say_unused(config["compression"])
    return backends


def backend(key: str, node: dict) -> Backend:
    """The backend of a config node; its hyperparameters are checked, unknown ones refused by name."""
    with refusals(f"{key}: "):
        make = build(key, node)
        for name, parameter in inspect.signature(make).parameters.items():
            if parameter.default is parameter.empty:
                raise ConfigError(f"{key}.{name} is not set, and has no default: {key}.{name}=...")
        return make()


def optimizers(node: dict, device: str) -> list:
    """The two optimizers' constructors, for a model on that device. Refuses what would fail at the first step."""
    for part, module in (("dense", "torch.optim"), ("embedding", "embeddings.optim")):
        if not node[part]["_target_"].startswith(f"{module}."):
            raise ConfigError(
                f"optimizer.{part}._target_={node[part]['_target_']}: must be of {module} "
                f"(the embeddings' gradients are rows, which only embeddings.optim can take)"
            )
        check_number(f"optimizer.{part}.lr", node[part].get("lr"), 0, float("inf"))
    makers = []
    for part in ("dense", "embedding"):
        make = build(f"optimizer.{part}", node[part])
        try:
            try_step(make, device)  # the optimizer judges its own hyperparameters
        except (ValueError, TypeError) as error:
            raise ConfigError(f"optimizer.{part}: {error}") from error
        except RuntimeError:
            if not node[part].get("fused"):
                raise
            make = functools.partial(make, fused=None)
            try_step(make, device)
            print(f"optimizer.{part}.fused=true: torch {torch.__version__} cannot on {device}, so steps are not fused")
        makers.append(make)
    return makers


def try_step(make, device: str) -> None:
    weight = torch.zeros(1, 1, device=device, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    make([weight]).step()


NUMBERING = {"vocabulary": "train", "min_count": 1, "id_order": "frequency", "max_rows": None}  # numbering of ids


def samples_fingerprint(node: dict, dataset) -> str:
    """The fingerprint of a dataset, by its node, that is the same however ids are numbered: whatever the cut-off."""
    plain = node | {key: value for key, value in NUMBERING.items() if key in node}
    return dataset.fingerprint if plain == node else build("data", plain).fingerprint


# --- refusing what cannot be done ------------------------------------------------------------------------------------


@contextlib.contextmanager
def refusals(prefix: str = ""):
    """ValueError and its kin, raised while building what the user asked for, become ConfigError."""
    try:
        yield
    except InstantiationException as error:
        raise ConfigError(f"{prefix}{error.__cause__ or error}") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{prefix}{error}") from error
    except RuntimeError as error:
        if not str(error).startswith("native="):
            raise
        raise ConfigError(f"{prefix}{error}") from error


def build(key: str, node: dict):
    """hydra's instantiate, after checking that the target has every key of the node and takes its values."""
    inner = {f"{key}.{n}": child for n, child in node.items() if isinstance(child, dict) and "_target_" in child}
    for place, one in {key: node, **inner}.items():
        target = get_object(one["_target_"])
        check_keys(place, target, one)
        check_types(place, target, one)
    return instantiate(node)


def check_folder(arguments: list[str]) -> Path | None:
    """The folder that a command line names, or None. Raises ConfigError if it is not empty: runs are never overwritten.

    This comes before hydra starts, since hydra writes .hydra into the folder. What a run leaves that died before it
    recorded anything is as good as nothing."""
    for argument in arguments:
        if jobs.key_of(argument) == "hydra.mode":
            raise ConfigError(f"{argument}: several runs are python train.py -m ...")
        if jobs.key_of(argument) == "hydra.output_subdir":
            raise ConfigError(f"{argument}: a run's folder has its configuration in .hydra, which finds it again")
        if jobs.key_of(argument) == "hydra.run.dir" and is_multirun(arguments):
            raise ConfigError(f"{argument}: the folder of several runs is hydra.sweep.dir")
    if is_multirun(arguments):
        key, folder, goes_on = "hydra.sweep.dir", jobs.said_folder(arguments), False
    else:
        key, (folder, goes_on) = "hydra.run.dir", composed_folder(arguments)
    is_taken = folder is not None and any(file.name not in (".hydra", *BEFORE_A_RUN) for file in folder.glob("*"))
    if is_taken and not (goes_on and (folder / ".hydra").is_dir()):
        raise ConfigError(f"{key}={folder}: that folder is not empty, and runs are not overwritten; name a new one")
    return folder


def composed_folder(arguments: list[str]) -> tuple[Path | None, bool]:
    """hydra.run.dir by hydra's own reading of a command line, and whether the run there may go on (resume=auto).

    None where a new folder is made for the run, or there is no run, as of --help."""
    asked = get_args(arguments)
    if asked.help or asked.hydra_help or asked.cfg or asked.info or asked.shell_completion:
        return None, False
    more = [f"hydra.searchpath=[file://{Path(asked.config_dir).resolve()}]"] if asked.config_dir else []
    conf = str(Path(CONF.parent, asked.config_path or CONF).resolve())
    with hydra.initialize_config_dir(conf, version_base="1.3", job_name=Path(__file__).stem):
        config = hydra.compose(asked.config_name or "config", [*asked.overrides, *more], return_hydra_config=True)
    goes_on = config.get("resume") == "auto"
    if not goes_on and "${run_folder:" in str(OmegaConf.to_container(config.hydra.run)["dir"]):
        return None, False
    HydraConfig.instance().set_config(config)  # for ${hydra:...}
    return Path(str(config.hydra.run.dir)), goes_on


if __name__ == "__main__":
    # for the processes that hydra/launcher=submitit_local or submitit_slurm starts, whatever folder they start in
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.environ.get("PYTHONPATH"))))
    sys.exit(main())
