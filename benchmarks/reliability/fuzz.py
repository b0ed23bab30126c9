"""Do the CPU kernels read and write within bounds, whatever they are called with?
python -m benchmarks.reliability.fuzz --seconds 300

Random calls of every operator in a process with AddressSanitizer and UBSan, about half of them hostile. A finding is a
report of a sanitizer, a crash, a call without end, an exception that is not a RuntimeError, ValueError or TypeError
with words, or other numbers than the reference's. Each is printed with the command that repeats it.
"""

import argparse
import copy
import faulthandler
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure
from embeddings import interaction, native, reference, relu, rules
from embeddings.rules import Rule

ROOT = Path(__file__).parents[2]
OUTCOMES = GOOD, REFUSED, FINDING = "good", "refused", "findings"
MOST_FINDINGS = 20  # then it ends
WITHOUT_END = 30  # seconds
COMPARED = 0.3  # of the calls: the reference takes ten times as long
CHEAP = 30_000  # numbers, which a call that is compared has at most
OPTIONS = {
    # memory that nobody wrote holds no zeros, so that reading it shows; what is too large is an error to torch
    "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=191:max_malloc_fill_size=1073741824:"
    "allocator_may_return_null=1:max_allocation_size_mb=512",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",
}

# --- here ------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of calls: starting and compiling not counted")
    parser.add_argument("--seed", type=int, default=random.randrange(10**9), help="of the first call; the next has + 1")
    parser.add_argument("--calls", type=int, default=10**12, help="at most")
    parser.add_argument("--beyond", action="store_true", help=argparse.SUPPRESS)  # must be found: read beyond the slab
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    fuzz = Fuzz(options)
    fuzz.run()
    print(fuzz.table())
    facts = {"command": shlex.join(["python", "-m", "benchmarks.reliability.fuzz", *given]), "seed": options.seed}
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    facts |= {"seconds": round(fuzz.seconds, 1), "calls": fuzz.calls, "findings": fuzz.findings}
    (folder / "fuzz.json").write_text(measure.as_text(measure.machine("cpu") | facts, fuzz.rows()))
    return int(bool(fuzz.findings))


class Fuzz:
    """Calls from options.seed on, in one process after another: a finding of a sanitizer ends its process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.counts, self.findings = options, Counter(), []
        self.calls, self.seconds, self.said = 0, 0.0, 0.0
        self.library = native.build_sanitized()
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "embeddings")])
        self.env = {**os.environ, **OPTIONS, "LD_PRELOAD": native.sanitizer_libraries(), "PYTHONPATH": paths}

    def run(self) -> None:
        while self.left() > 0 and self.calls < self.options.calls and len(self.findings) < MOST_FINDINGS:
            self.run_one_process()

    def left(self) -> float:
        return self.options.seconds - self.seconds

    def run_one_process(self) -> None:
        how = (str(self.library), self.options.seed + self.calls, self.options.calls - self.calls, self.left())
        code = f"from benchmarks.reliability import fuzz; fuzz.answer{(*how, self.options.beyond)}"
        before, began, running = self.seconds, 0.0, None
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", code], env=self.env, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            for line in process.stdout:
                label, outcome, what = json.loads(line)
                began = began or time.perf_counter()
                self.seconds = before + time.perf_counter() - began
                running = None if outcome else label
                if outcome:
                    self.count(label, outcome, what)
            status = process.wait()
            self.seconds = before + time.perf_counter() - (began or time.perf_counter())
            if status and running:
                errors.seek(0)
                self.count(running, FINDING, report_of(errors.read(), status))
            elif status:
                errors.seek(0)
                raise RuntimeError(f"no call was running, but the process ended:\n{errors.read()[-6000:]}")

    def count(self, label: str, outcome: str, what: str) -> None:
        seed = self.options.seed + self.calls
        self.calls += 1
        self.counts[label, outcome] += 1
        if outcome == FINDING:
            beyond = " --beyond" if self.options.beyond else ""
            repeat = f"python -m benchmarks.reliability.fuzz --seed {seed} --calls 1{beyond}"
            self.findings.append(f"{label}: {repeat}\n{what}")
            print(self.findings[-1], flush=True)
        if self.seconds - self.said > 10:
            self.said = self.seconds
            print(f"{self.calls:,} calls, {len(self.findings)} findings, {max(0, self.left()):.0f} s left", flush=True)

    def rows(self) -> list[dict]:
        labels = sorted({label for label, _ in self.counts})
        return [{"operator": x} | {outcome: self.counts[x, outcome] for outcome in OUTCOMES} for x in labels]

    def table(self) -> str:
        sums = {outcome: sum(row[outcome] for row in self.rows()) for outcome in OUTCOMES}
        rows = [*self.rows(), {"operator": f"all, {self.seconds:.0f} s"} | sums]
        lines = [f"{'':30}" + "".join(f"{word:>10}" for word in ("calls", *OUTCOMES))]
        for row in rows:
            numbers = [row[outcome] for outcome in OUTCOMES]
            lines.append(f"{row['operator']:30}" + "".join(f"{n:10,}" for n in (sum(numbers), *numbers)))
        return "\n".join(lines)


def report_of(errors: str, status: int) -> str:
    """What a process said at its end: the line that says what was wrong, and where in the kernels."""
    begin = re.search(r"^.*(ERROR: AddressSanitizer|runtime error:|Timeout|Fatal Python error)", errors, re.MULTILINE)
    if not begin:
        return f"  exit status {status}\n{errors[-1500:]}"
    first, *others = errors[begin.start() :].splitlines()
    frames = [line for line in others if re.search(r" in (void )?embeddings::", line)]
    where = [re.sub(r" *#\d+ 0x\w+ in ", "in ", line)[:120] for line in frames[:3]]
    return "\n".join(f"  {line}" for line in (f"exit status {status}: {first}", *where))


# --- there: in the process with the sanitizers -----------------------------------------------------------------------


def answer(library: str, seed: int, calls: int, seconds: float, beyond: bool) -> None:
    """Makes the calls of seeds from `seed` on; a line of JSON before each one and one after it."""
    import random_calls  # of tests/embeddings, on the path of this process alone

    torch.ops.load_library(library)
    began = time.perf_counter()
    for rng in map(random.Random, range(seed, seed + calls)):
        if time.perf_counter() - began > seconds:
            return
        call = random_calls.beyond_the_slab() if beyond else random_calls.random_call(rng)
        odd = [random_calls.spoil(rng, call) for _ in range(0 if beyond else rng.choice([0, 0, 0, 1, 1, 2]))]
        say(call.label, "", "")
        faulthandler.dump_traceback_later(WITHOUT_END, exit=True)
        outcome, what = outcome_of(call, not beyond and rng.random() < COMPARED)
        faulthandler.cancel_dump_traceback_later()
        say(call.label, outcome, f"  {'; '.join(odd)}\n  {what}" if outcome == FINDING else "")


def say(*words: str) -> None:
    print(json.dumps(words), flush=True)


def outcome_of(call, compared: bool) -> tuple[str, str]:
    """What became of a call, and why it is a finding."""
    operator = getattr(torch.ops.embeddings, call.operator)
    theirs = copy.deepcopy(call.args) if compared and is_comparable(call) else None
    try:
        results = operator(*call.args.values())
    except (RuntimeError, ValueError, TypeError) as error:
        return (REFUSED, "") if str(error).strip() else (FINDING, f"{type(error).__name__} without words")
    except Exception as error:
        return FINDING, repr(error)
    if theirs is None:
        return GOOD, ""
    try:
        wanted = reference_of(call.operator)(*theirs.values())
    except Exception as error:
        return FINDING, f"the reference refuses it: {error!r}"
    ours, theirs = tensors_of(results, call.args), tensors_of(wanted, theirs)
    different = [i for i, (x, y) in enumerate(zip(ours, theirs, strict=True)) if not is_same(call, x, y)]
    return (FINDING, f"other numbers than the reference's in tensors {different}") if different else (GOOD, "")


def is_comparable(call) -> bool:
    """Whether the reference takes as much as the kernels, is soon done, and every tensor has memory of its own."""
    args, tensors = call.args, tensors_of(None, call.args)
    if "tables" in args and (args["weights"] is None or (call.operator != "bag" and args["weights"].dim() != 2)):
        return False
    if "rule" in args:  # whose states and numbers the kernels take in any shape
        states = [x.shape for x in (args["first"], args["second"]) if x is not None]
        known = args["rule"] in list(Rule) and isinstance(args["numbers"], Tensor) and args["numbers"].dim() == 1
        if not known or states != rules.state_shapes(args["rule"], args["weights"]):
            return False
    places = [x.untyped_storage().data_ptr() for x in tensors if x.numel()]
    sizes = [0, *(n for x in tensors for n in x.shape), *(n for n in args.values() if isinstance(n, int))]
    return sum(x.numel() for x in tensors) <= CHEAP and max(sizes) < 2**31 and len(set(places)) == len(places)


def tensors_of(results: object, args: dict[str, object]) -> list[Tensor]:
    """What a call gave, and what it may have written to."""
    results = results if isinstance(results, tuple) else (results,)
    return [x for x in (*results, *args.values()) if isinstance(x, Tensor)]


def reference_of(operator: str):
    own = {
        "dot_interaction": interaction.reference,
        "dot_interaction_backward": interaction.reference_backward,
        "relu_backward": relu.reference,
    }
    return own.get(operator) or getattr(reference, operator)


def is_same(call, x: Tensor, y: Tensor) -> bool:
    """The same bits, NaN for NaN; where the reference sums in another order, or has other roots, about the same."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not x.is_floating_point():
        return torch.equal(x, y)
    roots = call.args.get("rule", Rule.SGD) != Rule.SGD and x.dtype == torch.float64
    if hasattr(reference, call.operator) and not roots:
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        both = x.isnan() & y.isnan()
        return bool((both | (x.contiguous().view(bits) == y.contiguous().view(bits))).all())
    numbers = torch.cat([z.double().flatten() for z in tensors_of(None, call.args)])
    size = float(numbers.abs().max()) if numbers.numel() else 0.0
    if not size < 1e9:  # sums of odd numbers depend on their order
        return True
    eps = [torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps, torch.finfo(x.dtype).eps]
    return torch.allclose(x.double(), y.double(), rtol=2 * eps[1], atol=100 * eps[0] * max(1.0, size**2))


if __name__ == "__main__":
    sys.exit(main())
