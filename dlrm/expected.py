"""What a protocol or an experiment says its run should reach, beside what it reached."""

from dlrm.refusals import ConfigError, check_number, near, some

METRICS = {  # tag's last word -> what the table calls it
    "auc": "AUC",
    "log_loss": "log loss",
    "normalized_entropy": "normalized entropy",
    "accuracy": "accuracy",
    "calibration": "calibration",
}


def check(expected: object) -> None:
    """Raises ConfigError unless expected is None or {source, within, metric: number, ...}, at_best: true or false.

    within: the tolerance, of every metric. at_best: the published number is of the best validation step."""
    if expected is None:
        return
    if not isinstance(expected, dict):
        raise ConfigError(f"expected={expected}: must be null or a group of keys, expected.source=...")
    allowed = ["source", "within", "at_best", *METRICS]
    for name in expected:
        if name not in allowed:
            raise ConfigError(
                f"expected.{name}: is no metric of test/*; there are {some(METRICS)}" + near(name, allowed)
            )
    if not isinstance(expected.get("source"), str):
        raise ConfigError(f"expected.source={expected.get('source')}: must say who published the numbers")
    if not isinstance(expected.get("at_best", False), bool):
        raise ConfigError(f"expected.at_best={expected['at_best']}: must be true or false")
    if not set(expected) & set(METRICS):
        raise ConfigError(f"expected has no number; give one of {some(METRICS)}")
    for name in ("within", *(name for name in METRICS if name in expected)):
        check_number(f"expected.{name}", expected.get(name), 0, 1e6)


def lines(summary: dict) -> list[str]:
    """One line per expected metric: what was expected, what came. summary: as in summary.json."""
    expected = summary.get("expected")
    if expected is None:
        return []
    split = "test_at_best" if expected.get("at_best") else "test"
    return [_line(f"{split}/{name}", expected[name], summary) for name in METRICS if name in expected]


def _line(tag: str, wanted: float, summary: dict) -> str:
    expected, got = summary["expected"], summary["last"].get(tag)
    split, _, name = tag.partition("/")
    where = " at the best validation AUC" if split == "test_at_best" else ""
    said = f"test {METRICS[name]}{where} {wanted:.4f} +- {expected['within']:g} [{expected['source']}], got"
    if got is None:
        return f"{said} none ({summary['reasons'].get(tag, 'not measured')})"
    distance = abs(got - wanted)
    side = f"{distance:.4f} {'above' if got > wanted else 'below'}"
    # 1e-9: a difference of decimals is not exact in float64
    return f"{said} {got:.4f} ({f'within: {side}' if distance <= expected['within'] + 1e-9 else side})"
