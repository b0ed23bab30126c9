"""Where a run goes on from, and whether that is the same run."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from dlrm import checkpoint
from dlrm.refusals import near, some

CONFIG = "resolved.yaml"  # in a run's folder: its configuration


def identity(config: dict) -> dict:
    """What a run must have equal to be resumed: what decides weights and samples, but not where files lie."""
    data = {
        key: value for key, value in config["data"].items() if key not in ("path", "cache", "memory_limit", "on_error")
    }
    same = ("model", "compression", "dense_below", "pooling", "seed")
    trainer = {key: config["trainer"][key] for key in ("batch_size", "average_from")}
    # precision is younger than the first checkpoints, which are fp32
    embedding, *features = (
        {key: value for key, value in node.items() if (key, value) != ("precision", "fp32")}
        for node in (config["embedding"], *config["features"].values())
    )
    named = {"embedding": embedding, "features": dict(zip(config["features"], features, strict=True))}
    return {key: config[key] for key in same} | named | {"data": data} | trainer


def find_start(config: dict, folder: Path, fingerprint: str) -> Path | None:
    """The checkpoint from which the run in a folder goes on, all its bytes read, or None if it begins anew.

    fingerprint: of its data. Raises ValueError if it cannot go on from there."""
    resume, same = config["resume"], json.loads(json.dumps(identity(config)))
    if resume in (None, "never"):
        check_despite(config["resume_despite"], same)
        return None
    if resume == "auto" and not checkpoint.all_in(folder):
        if (folder / "metrics.jsonl").exists():
            check_begins_anew(folder, same)
            print(f"{folder}: this run ended before its first checkpoint and begins anew")
        check_despite(config["resume_despite"], same)
        return None
    start = checkpoint.newest_whole(folder if resume == "auto" else resume)
    counters = checkpoint.read_counters(start)
    check_despite(config["resume_despite"], same, counters.get("identity", {}))
    check_same_run(start, counters, same, fingerprint, config["resume_despite"])
    checkpoint.check_kinds(start, kinds(config))
    print(f"goes on from step {counters['step']:,} ({start})")
    return start


def kinds(config: dict) -> dict[str, str]:
    """Name -> class of what a run saves as optimizers."""
    parts = {f"{part}_optimizer": config["optimizer"][part]["_target_"] for part in ("dense", "embedding")}
    average = {} if config["trainer"]["average_from"] is None else {"average": "WeightAverage"}
    return {name: target.rpartition(".")[2] for name, target in parts.items()} | average


def check_begins_anew(folder: Path, same: dict) -> None:
    """Raises ValueError unless the records in a folder without a checkpoint are of a run of this identity."""
    try:
        that = identity(yaml.safe_load((folder / CONFIG).read_text()))
    except (FileNotFoundError, KeyError, TypeError, yaml.YAMLError):
        raise ValueError(
            f"resume=auto: {folder} has records, no checkpoint and no {CONFIG} that says whose they are: name another "
            "hydra.run.dir"
        ) from None
    if difference := first_difference(that, same):
        key, saved, mine = difference
        raise ValueError(
            f"resume=auto: {folder} has the records of another run, and no checkpoint: {key} is {json.dumps(saved)} "
            f"there and {json.dumps(mine)} in this run; name another hydra.run.dir"
        )


def keep_config(folder: Path, text: str, start: Path | None) -> None:
    """Writes a run's configuration into its folder. Says in what it differs from that which led to the checkpoint it
    goes on from, and keeps that as resolved-until-STEP.yaml if it is the folder's own."""
    if start is not None:
        step, there = checkpoint.read_counters(start)["step"], start.parent.parent
        later = [path for until, path in kept_configs(there) if step <= until]
        before = later[0] if later else there / CONFIG
        was = yaml.safe_load(before.read_text()) if before.exists() else yaml.safe_load(text)
        changed = [one for one in differences(was, yaml.safe_load(text)) if not one[0].startswith("resume")]
        for key, old, new in changed:
            print(f"goes on with {key}={json.dumps(new)}, which was {json.dumps(old)}")
        if there.absolute() == folder.absolute():
            if changed:
                before.rename(folder / f"resolved-until-{step}.yaml")
            for until, path in kept_configs(folder):  # of steps that are done again
                if until > step:
                    path.unlink()
    temporary = folder / f".{CONFIG}.tmp"
    temporary.write_text(text)
    temporary.rename(folder / CONFIG)


def kept_configs(folder: Path) -> list[tuple[int, Path]]:
    """The configurations that a run's folder had before, each with the step until which it had it."""
    return sorted((int(path.stem.rpartition("-")[2]), path) for path in folder.glob("resolved-until-*.yaml"))


def check_despite(keys: Iterable[str], *identities: dict) -> None:
    """Raises ValueError, with the nearest that is, for a key that is none of these nested dicts."""
    allowed = list(dict.fromkeys(key for identity in identities for key in dotted(identity)))
    for key in keys:
        if key not in allowed:
            words = some(key for key in allowed if "." not in key)
            raise ValueError(f"resume_despite=[{key}]: must be of {words}, or a key of those{near(key, allowed)}")


def dotted(node: dict, prefix: str = "") -> Iterator[str]:
    """The keys of nested dicts, those of inner ones after their own."""
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{name}.")


def check_not_over(start: Path, num_steps: int) -> None:
    """Raises ValueError where a longer run's checkpoint has no step left for one of num_steps steps.

    The last one of an equally long run has its evaluation to do."""
    counters = checkpoint.read_counters(start)
    step, that = counters["step"], counters.get("num_steps", counters["step"])
    if num_steps <= step and num_steps < that:
        raise ValueError(
            f"{start} is of step {step:,}, and this run ends after {num_steps:,} steps: nothing is left to train; "
            f"trainer.max_steps and trainer.epochs must allow more than {step:,}"
        )


def rows_to_keep(folder: Path, start: Path | None) -> int | None:
    """How many records of the folder's own run the checkpoint has seen; None if there are no records."""
    if start is not None:
        counters = checkpoint.read_counters(start)
        if "rows" not in counters:
            raise ValueError(
                f"resume=auto: {start} is of an older version, which did not count records; resume={start}"
            )
        return counters["rows"]
    return 0 if (folder / "metrics.jsonl").exists() else None


def differences(saved: object, mine: object, key: str = "") -> Iterator[tuple[str, object, object]]:
    """The dotted keys at which two nested dicts differ, and both values (None: missing)."""
    if isinstance(saved, dict) and isinstance(mine, dict):
        for name in mine | saved:
            yield from differences(saved.get(name), mine.get(name), f"{key}.{name}" if key else name)
    elif saved != mine:
        yield key, saved, mine


def first_difference(saved: object, mine: object) -> tuple[str, object, object] | None:
    """The first of `differences`, or None."""
    return next(differences(saved, mine), None)


def check_same_run(path: Path, counters: dict, identity: dict, fingerprint: str, despite: Iterable[str] = ()) -> None:
    """Raises ValueError, with the difference, unless a checkpoint's counters are of a run of this identity and data.

    despite: dotted keys of the identity that may differ, and "data" for the data itself."""
    saved, mine = (without(whole, despite) for whole in (counters.get("identity", {}), identity))
    if difference := first_difference(saved, mine):
        key, *values = difference
        saved, mine = map(json.dumps, values)
        raise ValueError(
            f"resume={path}: that is another run: {key} is {saved} there and {mine} in this run "
            f"(resume_despite=[{key}] goes on all the same)"
        )
    if counters["fingerprint"] != fingerprint and "data" not in despite:
        raise ValueError(
            f"resume={path}: that run's data was other data (fingerprint {counters['fingerprint']}, now {fingerprint}; "
            "resume_despite=[data] goes on all the same)"
        )


def without(whole: dict, keys: Iterable[str]) -> dict:
    """Nested dicts less what these dotted keys name."""
    left = json.loads(json.dumps(whole))
    for key in keys:
        *parents, last = key.split(".")
        inner = left
        for parent in parents:
            inner = inner.get(parent) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(last, None)
    return left
