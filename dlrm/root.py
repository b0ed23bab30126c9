"""The root of a run's configuration: its keys, types and ranges. What belongs to a component is checked by it."""

from dlrm import expected, linear
from dlrm.refusals import ConfigError, check_number, groups, keys_below, near, some
from embeddings import native


def check_root(config: dict) -> None:
    """Raises ConfigError, naming key, value and what is allowed."""
    allowed = [*keys_below(""), *groups()]
    for key in config:
        if key not in allowed:
            raise ConfigError(f"{key} is no key; the keys are {some(allowed)}" + near(key, allowed))
    if (fused := config["optimizer"].get("fused")) not in ("auto", True, False):
        raise ConfigError(f"optimizer.fused={fused}: must be one of auto, true, false")
    despite = config["resume_despite"]
    if not isinstance(despite, list) or not all(isinstance(key, str) for key in despite):
        raise ConfigError(f"resume_despite={despite}: must be a list of keys, resume_despite=[compression]")
    if not isinstance(config["resume"], str | None):
        raise ConfigError(f"resume={config['resume']}: must be never, auto or the path of a run")
    for key in ("features", "trainer", "checkpoint"):
        if not isinstance(config[key], dict):
            raise ConfigError(f"{key}={config[key]}: must be a group of keys, {key}.NAME=...")
    check_number("compression", config["compression"], 0, 1)
    check_number("dense_below", config["dense_below"], 0, float("inf"), whole=True)
    check_number("seed", config["seed"], 0, 2**63 - 1, whole=True)
    expected.check(config["expected"])
    for key, choices in {
        "native": native.MODES,
        "linear": linear.CHOICES,
        "pooling": ("sum", "mean", "max"),
        "deterministic": (True, False),
        "data_on_device": (True, False),
    }.items():
        if config[key] not in choices:
            raise ConfigError(f"{key}={config[key]}: must be one of {some(choices)}" + near(config[key], choices))
    nodes = [node for node in (config["embedding"], *config["features"].values()) if isinstance(node, dict)]
    accumulate = [node.get("accumulate") for node in nodes]
    if config["deterministic"] and "atomic" in accumulate:
        raise ConfigError("deterministic=true: accumulate=atomic does not repeat; use accumulate=rows or sorted")
