"""conf/protocol: each composes and trains on generated files of its format; expected beside got, in the right words."""

import gzip
import json
import random
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import train
from dlrm import expected
from dlrm.refusals import ConfigError

pytestmark = pytest.mark.once
ROOT = Path(__file__).parent.parent
PROTOCOLS = sorted(path.stem for path in (ROOT / "conf/protocol").glob("*.yaml"))
HASHES = [f"{i * 0x1234567:08x}" for i in range(9)]
# sizes of a second; what a protocol does not have is not named
SMALL = {
    "dlrm_kaggle_1epoch": ["model.bottom_mlp=[8,4]"],
    "cafe": ["model.bottom_mlp=[8,4]"],
    "bars_x1": ["model.bottom_mlp=[8,4]"],
    "bars_x4": ["model.bottom_mlp=[4]", "model.interaction.rank=4"],
    "mlperf_v1": ["model.bottom_mlp=[8,4]", "data.days=3"],
    "dcnv2": ["model.bottom_mlp=[8,4]", "model.interaction.rank=4", "data.days=3"],
}


def raw_line(rng: random.Random) -> str:
    """A line as Criteo publishes them: label, 13 counts, 26 hashes; fields may be empty."""
    numbers = [rng.choice(["", "0", "-1", "3", "250"]) for _ in range(13)]
    return "\t".join([str(rng.randrange(2)), *numbers, *(rng.choice(["", *HASHES]) for _ in range(26))]) + "\n"


def csv_of(rng: random.Random, rows: int, *, label: str, numbers: list[str], values: list[str]) -> str:
    """A file of Criteo_x1 or Criteo_x4, with its header."""
    header = [label, *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    fields = lambda: [str(rng.randrange(2)), *rng.choices(numbers, k=13), *rng.choices(values, k=26)]  # noqa: E731
    return "\n".join(map(",".join, [header, *(fields() for _ in range(rows))])) + "\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """data= -> files of its format, a few hundred rows."""
    folder, rng = tmp_path_factory.mktemp("raw"), random.Random(0)
    lines = [raw_line(rng) for _ in range(280)]
    (folder / "train.txt").write_text("".join(lines))
    for name in ("days", "x1", "x4"):
        (folder / name).mkdir()
    for day in (0, 1):
        (folder / f"days/day_{day}").write_text("".join(lines[day * 100 : day * 100 + 100]))
    (folder / "days/day_2.gz").write_bytes(gzip.compress("".join(lines[200:]).encode()))
    x1 = {"label": "label", "numbers": ["0.5", "0", "0.013"], "values": ["0", "17", "100001"]}
    x4 = {"label": "Label", "numbers": ["", "-1", "2", "3", "9000"], "values": ["", *HASHES]}
    for name, form in (("x1", x1), ("x4", x4)):
        for split, rows in (("train", 200), ("valid", 40), ("test", 40)):
            (folder / name / f"{split}.csv").write_text(csv_of(rng, rows, **form))
    forms = {"criteo_kaggle": "train.txt", "criteo_1tb": "days", "criteo_x1": "x1", "criteo_x4": "x4"}
    return {data: folder / name for data, name in forms.items()}


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli(*arguments) runs train.py in an empty folder -> (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        return train.main(), *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_trains_on_files_of_its_format_and_says_what_was_expected(name, cli, files, tmp_path):
    text = (ROOT / f"conf/protocol/{name}.yaml").read_text()
    (path,) = (path for data, path in files.items() if f"override /data: {data}\n" in text)
    small = ["model.embedding_dim=4", "model.top_mlp=[8,1]", "trainer.batch_size=32", "trainer.max_steps=3"]
    status, out, err = cli(f"protocol={name}", f"data.path={path}", *small, *SMALL[name], "hydra.run.dir=run")
    assert status == 0, err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 3 and summary["expected"]["source"] in text
    said = [line for line in out.splitlines() if line.startswith("expected")]
    wanted = [metric for metric in expected.METRICS if metric in summary["expected"]]
    assert len(said) == len(wanted) > 0
    assert all(f"[{summary['expected']['source']}], got 0." in line for line in said), said


# as published: batch, epochs, learning rate, optimizers, dimension, widths of the top, id order, rows that are numbered
SGD, ADAGRAD, ADAM = (("torch.optim.SGD", "SGD"), ("torch.optim.Adagrad", "Adagrad"), ("torch.optim.Adam", "Adam"))
PUBLISHED = {
    "dlrm_kaggle_1epoch": (128, 1, 0.1, SGD, 16, [512, 256, 1], "appearance", "all"),
    "cafe": (128, 1, 0.1, SGD, 16, [512, 256, 1], "lexical", "all"),
    "bars_x1": (4096, 17, 0.001, ADAM, 10, [400, 400, 400, 1], "frequency", "train"),
    "bars_x4": (10000, 9, 0.001, ADAM, 16, [1000] * 5 + [1], "frequency", "train"),
    "mlperf_v1": (2048, 1, 1.0, SGD, 128, [1024, 1024, 512, 256, 1], "appearance", "all"),
    "dcnv2": (65536, 1, 0.005, ADAGRAD, 128, [1024, 1024, 512, 256, 1], "appearance", "all"),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_composes_to_what_was_published(name):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", [f"protocol={name}", "data.path=somewhere"])
    dense, embedding, data = config.optimizer.dense, config.optimizer.embedding, config.data
    kinds = (dense._target_, embedding._target_.rpartition(".")[2])
    found = (config.trainer.batch_size, config.trainer.epochs, dense.lr, kinds, config.model.embedding_dim)
    assert (*found, list(config.model.top_mlp), data.id_order, data.vocabulary) == PUBLISHED[name]
    assert embedding.lr == dense.lr and config.embedding._target_ == "embeddings.Dense" and config.compression == 1
    assert (data.min_count == 10) == (name == "bars_x4")
    assert (data.get("max_ind_range"), data.max_rows) == {
        "mlperf_v1": (40_000_000, None),
        "dcnv2": (None, 40_000_000),
    }.get(name, (None, None))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_says_its_command_its_source_and_that_it_was_not_run(name):
    lines = (ROOT / f"conf/protocol/{name}.yaml").read_text().splitlines()
    assert lines[1].startswith(f"# python train.py protocol={name} data.path=")
    comment = "\n".join(lines[2 : lines.index("defaults:")])
    assert comment.startswith("# Claim: ") and "# Not run on the real data yet" in comment and "# Differs" in comment
    assert f"protocol={name} " in (ROOT / "docs/protocols.md").read_text()


def summary(got: float | None, **more) -> dict:
    wanted = {"source": "someone, 2020", "auc": 0.80212, "within": 0.0005} | more
    return {"expected": wanted, "last": {"test/auc": got}, "reasons": {"test/auc": "no samples"}}


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (0.79904, "got 0.7990 (0.0031 below)"),
        (0.80300, "got 0.8030 (0.0009 above)"),
        (0.80200, "got 0.8020 (within: 0.0001 below)"),
        (0.80262, "got 0.8026 (within: 0.0005 above)"),
        (None, "got none (no samples)"),
    ],
)
def test_the_expected_line_says_above_below_or_within(got, words):
    assert expected.lines(summary(got)) == [f"test AUC 0.8021 +- 0.0005 [someone, 2020], {words}"]


def test_what_is_expected_at_the_best_validation_step_is_compared_there():
    found = summary(0.5, at_best=True)
    found["last"]["test_at_best/auc"] = 0.80212
    (line,) = expected.lines(found)
    assert line.startswith("test AUC at the best validation AUC 0.8021") and "got 0.8021 (within" in line
    assert expected.lines({"expected": None}) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"acu": 0.8}, "expected.acu: is no metric of test/*; there are auc, log_loss.* - did you mean auc?"),
        ({"auc": "high"}, "expected.auc=high"),
        ({"within": None}, "expected.within=None"),
        ({"within": -1}, "expected.within=-1"),
        ({"source": None}, "expected.source=None: must say who"),
        ({"at_best": 1}, "expected.at_best=1"),
    ],
)
def test_what_cannot_be_expected_is_refused_by_name(wrong, words):
    with pytest.raises(ConfigError, match=words.replace("?", r"\?").replace("/*", r"/\*")):
        expected.check({"source": "someone", "auc": 0.8, "within": 0.001} | wrong)
    with pytest.raises(ConfigError, match="expected has no number"):
        expected.check({"source": "someone", "within": 0.001})


def test_expected_of_an_unknown_metric_ends_the_run_before_data_is_read(cli):
    status, out, err = cli("+expected={source: someone, acu: 0.8, within: 0.1}")
    assert status == 2 and "expected.acu" in err and "did you mean auc?" in err and "data:" not in out
