"""Train a recommender: config -> data, embeddings, model, trainer. The composition root and only importer of hydra.

python train.py embedding=hashed compression=0.1
"""

import contextlib
import difflib
import inspect
import itertools
import os

# Before torch starts its threads: a waiting thread sleeps instead of spinning. On an idle machine that costs little;
# beside other processes spinning costs most of the speed (2 cores, one of them busy: 14,000 against 95,000 samples/s).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import re
import sys
from collections import Counter
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlrm.log import RunLog
from dlrm.memory import format_bytes, reset_peak
from dlrm.run_folder import config_hash, git_commit, make_run_folder
from dlrm.settings import TrainerSettings
from dlrm.trainer import Trainer
from embeddings import Dense, EmbeddingBags, native, seed_of
from embeddings.backend import Backend

CONF = Path(__file__).resolve().parent / "conf"


class ConfigError(Exception):
    """What the user asked for cannot be done; the message names the key, the value and what is allowed."""


def main() -> int:
    """Run the command line. Returns the exit status: 0, 1 if training failed, 2 if it was refused, 130 after Ctrl-C."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises, and the message below is ours
    # cached: hydra asks for the folder more than once, and must get the same one
    OmegaConf.register_new_resolver("unique_folder", unique_folder, use_cache=True, replace=True)
    try:
        run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
    except FloatingPointError as error:  # the summary is written and says so too
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    else:
        return 0
    return 2


def unique_folder(path: str) -> str:
    """${unique_folder:PATH} in the config: creates the folder, with a suffix if it is taken."""
    return str(make_run_folder(path))


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def run(composed) -> None:
    """One run, in the folder that hydra made for it."""
    config = OmegaConf.to_container(composed, resolve=True)
    folder = Path(HydraConfig.get().runtime.output_dir)
    (folder / "resolved.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    if train(config, folder)["status"] == "interrupted":
        raise KeyboardInterrupt  # ends a sweep too


def train(config: dict, folder: Path) -> dict:
    """Build everything that `config` names, train, return the summary. Raises ConfigError before any row is read."""
    reset_peak(config["device"] if torch.cuda.is_available() else "cpu")
    with refusals():
        check_root(config)
        settings = TrainerSettings(
            **config["trainer"], **{key: config[key] for key in ("precision", "device", "deterministic")}
        )
        dataset = instantiate(config["data"])
        backends = Backends(config, dataset.feature_names)
        make_dense, make_embedding = optimizers(config["optimizer"])
        native.load(config["native"])
    with refusals():  # some ratios and widths can only be judged once the number of ids is known
        dataset.prepare(backends.take_any_id(dataset.feature_names))
        chosen = backends.choose(dataset.cardinalities)
        dataset.prepare({feature for feature, backend in chosen.items() if not backend.ranged})
        bags = EmbeddingBags(chosen, dataset.cardinalities, pooling=config["pooling"], seed=config["seed"])
        torch.manual_seed(seed_of(config["seed"], "model"))
        model = instantiate(config["model"])(bags, len(dataset.dense_names)).to(config["device"])
        log = RunLog(folder, facts=facts(config), hparams=hparams(config), resume_step=None)
    print_plan(dataset, bags)
    trainer = Trainer(
        model,
        dataset,
        dense_optimizer=make_dense(model.dense_parameters()),
        embedding_optimizer=make_embedding(bags.parameters()),
        settings=settings,
        log=log,
    )
    if config["resume"] is not None:
        with refusals():
            trainer.resume(config["resume"])
    return trainer.train()


class Backends:
    """Which backend each feature gets: its own under `features`, else `embedding`, or dense if it is small."""

    def __init__(self, config: dict, feature_names: list[str]):
        self.default = backend("embedding", config["embedding"])
        self.named = {}
        for name, node in config["features"].items():
            if name not in feature_names:
                raise ConfigError(
                    f"features names no column {name!r}; data has {some(feature_names)}" + near(name, feature_names)
                )
            if not isinstance(node, dict):
                raise ConfigError(f"features.{name}={node}: give it a backend: +embedding@features.{name}=hashed")
            # without a backend of its own, a feature adjusts the default's hyperparameters
            own = node if "_target_" in node else config["embedding"] | node
            self.named[name] = backend(f"features.{name}", own)
        self.dense_below = config["dense_below"]
        self.dense = Dense(
            embedding_dim=self.default.embedding_dim, compression=1.0, accumulate=self.default.accumulate
        )
        if isinstance(self.default, Dense) and config["compression"] != 1:
            print(f"embedding=dense keeps every row: compression={config['compression']:g} does not apply to it")

    def take_any_id(self, feature_names: list[str]) -> set[str]:
        """The features that might get a backend without an upper limit of ids."""
        return {f for f in feature_names if not self.named.get(f, self.default).ranged}

    def choose(self, cardinalities: dict[str, int]) -> dict[str, Backend]:
        """Feature -> backend, in the order of cardinalities."""
        usual = {f: self.dense if n < self.dense_below else self.default for f, n in cardinalities.items()}
        return {f: self.named.get(f, usual[f]) for f in cardinalities}


def backend(key: str, node: dict) -> Backend:
    """The backend of a config node; its hyperparameters are checked, unknown ones refused by name."""
    make = instantiate(node)
    allowed = [name for name in inspect.signature(make.func).parameters]
    for name in make.keywords:
        if name not in allowed:
            raise ConfigError(
                f"{key}.{name}: {make.func.__name__} has no such key; it has {some(allowed)}" + near(name, allowed)
            )
    try:
        return make()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}: {error}") from error


def optimizers(node: dict) -> tuple:
    """The two optimizers' constructors. Refuses what would fail at the first step."""
    for part, module in (("dense", "torch.optim"), ("embedding", "embeddings.optim")):
        if not node[part]["_target_"].startswith(f"{module}."):
            raise ConfigError(
                f"optimizer.{part}._target_={node[part]['_target_']}: must be of {module} "
                f"(the embeddings' gradients are rows, which only embeddings.optim can take)"
            )
        check_number(f"optimizer.{part}.lr", node[part].get("lr"), 0, float("inf"))
    makers = instantiate(node["dense"]), instantiate(node["embedding"])
    for part, make in zip(("dense", "embedding"), makers, strict=True):
        with refusals(f"optimizer.{part}: "):
            make([torch.zeros(1, 1, requires_grad=True)])  # the constructor judges its own hyperparameters
    return makers


def check_root(config: dict) -> None:
    """Keys, types and ranges of the root. What belongs to a component is checked by it."""
    allowed = [*(key for key in OmegaConf.load(CONF / "config.yaml") if key not in ("defaults", "hydra")), *groups()]
    for key in config:
        if key not in allowed:
            raise ConfigError(f"{key} is no key; the keys are {some(allowed)}" + near(key, allowed))
    check_number("compression", config["compression"], 0, 1)
    check_number("dense_below", config["dense_below"], 0, float("inf"), whole=True)
    check_number("seed", config["seed"], 0, 2**63 - 1, whole=True)
    for key, choices in {
        "native": native.MODES,
        "pooling": ("sum", "mean", "max"),
        "deterministic": (True, False),
    }.items():
        if config[key] not in choices:
            raise ConfigError(f"{key}={config[key]}: must be one of {some(choices)}" + near(config[key], choices))
    atomic = [config["embedding"], *config["features"].values()]
    if config["deterministic"] and any(isinstance(n, dict) and n.get("accumulate") == "atomic" for n in atomic):
        raise ConfigError("deterministic=true: accumulate=atomic does not repeat; use accumulate=rows or sorted")


def check_number(key: str, value, low: float, high: float, *, whole: bool = False) -> None:
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        span = f"{low} to {high}" if high < float("inf") else f"at least {low}"
        raise ConfigError(f"{key}={value}: must be a {'whole ' if whole else ''}number, {span}")


def print_plan(dataset, bags: EmbeddingBags) -> None:
    """Which data, and what the embeddings take, before the first step."""
    counts = Counter(row["backend"] for row in bags.feature_table())
    kinds = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"data: {dataset.describe()}")
    print(
        f"embeddings: features {kinds}, in {len(bags.slabs)} slabs; {format_bytes(bags.num_bytes())}, "
        f"all dense {format_bytes(bags.dense_equivalent_bytes())}",
        flush=True,
    )


def facts(config: dict) -> dict:
    """What summary.json says of the run beside its results."""
    return {
        "seed": config["seed"],
        "device": config["device"],
        "torch": torch.__version__,
        "native": native.ensure(),
        "git_commit": git_commit(),
        "config_hash": config_hash(config),
    }


def hparams(config: dict) -> dict:
    """The flat choices that TensorBoard compares runs by."""
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    names = {group: chosen[group] for group in groups() if chosen.get(group)}
    plain = {key: config[key] for key in ("compression", "dense_below", "pooling", "seed", "precision", "device")}
    rates = {f"lr/{part}": config["optimizer"][part]["lr"] for part in ("dense", "embedding")}
    return names | plain | rates | {"batch_size": config["trainer"]["batch_size"]}


# --- refusing what cannot be done ------------------------------------------------------------------------------------


@contextlib.contextmanager
def refusals(prefix: str = ""):
    """ValueError and its kin, raised while building what the user asked for, become ConfigError."""
    try:
        yield
    except InstantiationException as error:
        raise ConfigError(f"{prefix}{error.__cause__ or error}") from error
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise ConfigError(f"{prefix}{error}") from error


def explain(error: Exception) -> str:
    """Hydra's refusal in one line, with what is allowed and the nearest valid spelling."""
    text = str(error)
    if option := re.search(r"Could not find '(.+)/([^/']+)'", text):
        group, name = option.groups()
        allowed = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        return f"{group}={name}: must be one of {some(allowed)}" + near(name, allowed)
    if key := re.search(r"Could not override '([^']+)'", text):
        path = key.group(1).split("@")[0]
        parent, _, name = path.rpartition(".")
        allowed = [*keys_below(parent), *(groups() if not parent else [])] or keys_below("")
        return f"{path} is no key; {parent or 'the root'} has {some(allowed)}" + near(name, allowed)
    return text.splitlines()[0] if text else repr(error)


def keys_below(parent: str) -> list[str]:
    """Keys that some choice of config puts under `parent`."""
    group, *rest = parent.split(".") if parent else [None]
    files = [CONF / "config.yaml"]
    if group in groups():
        files = [*(CONF / group).glob("*.yaml"), *(CONF / group / (rest[0] if rest else "")).glob("*.yaml")]
        parent = ".".join(rest) if not (CONF / group / (rest[0] if rest else "?")).is_dir() else ""
    found = (OmegaConf.select(OmegaConf.load(file), parent) if parent else OmegaConf.load(file) for file in files)
    keys = itertools.chain.from_iterable(node.keys() for node in found if OmegaConf.is_dict(node))
    return [key for key in dict.fromkeys(keys) if key not in ("defaults", "hydra") and not str(key).startswith("_")]


def groups() -> list[str]:
    return sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())


def near(name: object, allowed) -> str:
    matches = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1)
    return f" - did you mean {matches[0]}?" if matches else ""


def some(names) -> str:
    names = [str(name) for name in names]
    return ", ".join(names) if len(names) <= 40 else f"{', '.join(names[:40])}, ... ({len(names)} in all)"


if __name__ == "__main__":
    sys.exit(main())
