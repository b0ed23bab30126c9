"""The training run, top to bottom as it happens: batch, forward, loss, backward, step, log, evaluate, save."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from dlrm import checkpoint, memory
from dlrm.average import WeightAverage
from dlrm.best import BestWeights
from dlrm.board import NUM_SAMPLES, add_feature_histograms
from dlrm.checkpoints import Checkpoints
from dlrm.evaluation import Evaluation, evaluate, predict
from dlrm.feed import on_device
from dlrm.graph import CudaGraphs, DenseStep, GraphedStep
from dlrm.guards import Guards
from dlrm.interrupt import Interrupt, Stop
from dlrm.log import RunLog
from dlrm.model import DLRM
from dlrm.progress import Progress
from dlrm.report import NOT_LEARNED, NOT_SAVED, final_table
from dlrm.resume import check_same_run
from dlrm.settings import TrainerSettings
from embeddings import native

if TYPE_CHECKING:
    from data.batch import Batch


class Trainer:
    """Trains a model on a dataset and evaluates it; everything about the run ends up in `log`.

    dataset: the interface of the data package, prepared. embedding_optimizer holds the parameters of model.embeddings,
    dense_optimizer all others, both on settings.device. identity: JSON values, what a run must have equal to be resumed
    as this one, by the keys of the configuration. Raises ValueError when there is nothing to train on.
    """

    def __init__(
        self,
        model: DLRM,
        dataset,
        *,
        dense_optimizer: torch.optim.Optimizer,
        embedding_optimizer: torch.optim.Optimizer,
        settings: TrainerSettings,
        log: RunLog,
        identity: dict,
    ):
        self.num_train = dataset.num_samples["train"]
        if self.num_train == 0:
            raise ValueError("data: the training split has no samples")
        self.model, self.dataset, self.settings, self.log = model, dataset, settings, log
        self.identity = json.loads(json.dumps(identity, allow_nan=False))  # as a checkpoint gives it back
        self.optimizers = {"dense_optimizer": dense_optimizer, "embedding_optimizer": embedding_optimizer}
        self.full_rates = {name: [g["lr"] for g in o.param_groups] for name, o in self.optimizers.items()}
        self.average = None if settings.average_from is None else WeightAverage(model.parameters())
        self.saved = self.optimizers | ({} if self.average is None else {"average": self.average})
        self.num_steps = settings.num_steps(self.num_train)
        self.eval_split = "valid" if dataset.num_samples["valid"] else "test"
        chooses = settings.keep_best and settings.eval_every and self.eval_split == "valid"
        self.best = BestWeights(log.folder / "checkpoints") if chooses else None
        self.checkpoints = Checkpoints(log.folder / "checkpoints", model, self.saved, settings.checkpoint)
        # the loop's state, which a checkpoint keeps beside the tensors; sample: how many of this epoch are trained on
        self.step = self.epoch = self.sample = 0
        self.records_due = False  # whether an interrupt came before what belongs behind the step was recorded
        # samples trained on, seconds of training and of all, also before the run went on; seconds of evaluation since
        self.num_samples, self.train_seconds, self.seconds, self.eval_seconds = 0, 0.0, 0.0, 0.0
        self.train_began: float | None = None  # on a clock that stands still during evaluation; None: not training
        self.loss_sum, self.num_losses = torch.zeros((), device=settings.device), 0  # of losses not yet logged
        self.gradient_bytes = 0  # the most that a step's gradients of the embeddings took
        self.beats_constant_predictor: bool | None = None  # by the last evaluation
        self.has_warned = False
        self.interrupt, self.progress = Interrupt(), None
        self.guards = Guards(model, dataset.feature_names, dataset.dense_names, step=lambda: self.step)
        self.run_step = self._make_step()

    def resume(self, path: Path | str, despite: Iterable[str] = ()) -> None:
        """Goes on from the newest checkpoint at path that is whole: a run's folder, its checkpoints folder, or one
        checkpoint. If it is of this run's own folder, `log` has its records. despite: see `check_same_run`.

        Raises ValueError, before anything is changed, when it is damaged or of a run with another identity or data.
        """
        there = checkpoint.all_in(path)  # of one there is no choice, and `load` reads its bytes
        path = checkpoint.newest_whole(path) if len(there) > 1 else checkpoint.find(path)
        counters = checkpoint.read_counters(path)
        check_same_run(path, counters, self.identity, self.dataset.fingerprint, despite)
        checkpoint.load(path, self.model, self.saved)
        self.step, self.epoch, self.sample = counters["step"], counters["epoch"], counters["sample"]
        self.num_samples = counters.get("samples", 0)
        self.train_seconds, self.seconds = counters.get("train_seconds", 0.0), counters.get("seconds", 0.0)
        self.loss_sum.fill_(counters.get("loss_sum", 0.0))
        self.num_losses, self.gradient_bytes = counters.get("num_losses", 0), counters.get("gradient_bytes", 0)
        self.has_warned, self.records_due = counters.get("has_warned", False), counters.get("records_due", False)
        self.guards.recent_losses.extend(counters.get("recent_losses", ()))
        is_own = path.parent == self.log.folder / "checkpoints"
        if is_own and (pending := counters.get("pending")):
            values = {tag: math.nan if value is None else value for tag, value in pending["values"].items()}
            self.log.add(values, pending["reasons"])
            if not self.records_due and self.step != self.num_steps:  # it was that run's last step
                self.log.write(self.step)
        if self.records_due:
            self._set_rates(self.step - 1)
        if self.best is not None:
            self.best.adopt(path.parent, self.step)
        if self.sample == self.num_train:  # saved at the very end of an epoch
            self.epoch, self.sample = self.epoch + 1, 0

    def train(self) -> dict:
        """Runs to the end, or to SIGINT or SIGTERM; returns the summary, which is in summary.json and on the terminal.

        A checkpoint that cannot be written is said, and in the summary; the results are reported all the same.
        Raises FloatingPointError when inputs, loss, gradients or weights are not finite: on the CPU before that step's
        update, naming step and tensor; on CUDA, where to look is to wait, when the loss is logged, naming the steps
        since the last time.
        """
        self.began = time.perf_counter() - self.seconds
        results = {"status": "failed", "checkpoint": None, "checkpoint_error": None}
        if self.eval_split == "test":
            print("no validation samples: eval/* is measured on the test split, so the best of eval/* is chosen on it")
        if self.step and self.best is not None and self.best.step is None:
            print(f"resumed at step {self.step:,} of a run that kept no best weights: the best eval/auc is of this run")
        if (warmup := self.settings.warmup_steps) >= self.num_steps:
            when = "never reaches its value" if warmup > self.num_steps else "reaches its value only at the last step"
            print(f"the learning rate {when}: warm-up takes {warmup:,} of {self.num_steps:,} steps")
        try:
            with _deterministic(self.settings.deterministic), _products(self.settings.precision), self.interrupt:
                self._train_steps()
                if self.settings.save_checkpoint:
                    results |= self._save()
                self._evaluate_at_end()
            results["status"] = "completed"
        except KeyboardInterrupt:
            results |= {"status": "interrupted", "signal": self.interrupt.requested or signal.SIGINT.value}
        except BaseException as error:
            results["status"] = f"failed: {error}"
            raise
        finally:
            with suppress(OSError, FloatingPointError):  # if training failed; else it is written, or was said
                self.checkpoints.wait()
            self._add_memory()
            self.log.text("embeddings/features", self._ledger())
            self.log.write(self.step)
            if self.best is not None and not self.settings.save_checkpoint:
                self.best.remove()
            summary = self.log.finish(self._facts() | results | {"seconds": time.perf_counter() - self.began})
        print(final_table(summary))
        return summary

    def _train_steps(self) -> None:
        batch_size = self.settings.batch_size
        num_epochs, rest = divmod(self.num_steps, -(-self.num_train // batch_size))
        total = num_epochs * self.num_train + min(rest * batch_size, self.num_train)
        now = time.perf_counter()
        self.train_began, self.last_log = now - self.train_seconds, (now, self.num_samples)
        with Progress(total, self.epoch * self.num_train + self.sample) as self.progress:
            try:
                if self.records_due:
                    self._record()
                while self.step < self.num_steps and not self.interrupt.requested:
                    self._train_epoch()
            except Stop:  # in an evaluation, before which the weights are whole
                pass
            finally:
                self.train_seconds, self.train_began = self._trained_for(), None

    def _trained_for(self) -> float:
        """Seconds of training, those before the run went on included."""
        if self.train_began is None:
            return self.train_seconds
        return time.perf_counter() - self.eval_seconds - self.train_began

    def _train_epoch(self) -> None:
        """Trains from self.sample to the end of the epoch, or to the end of the run, or until it is interrupted."""
        settings = self.settings
        self.model.train()
        batches = self.dataset.batches("train", settings.batch_size, epoch=self.epoch, start=self.sample)
        for batch in on_device(batches, settings.device):
            self._train_step(batch)
            self.records_due = True
            if self.interrupt.requested:
                return
            self._record()
            if self.step == self.num_steps:
                return
        self.epoch, self.sample = self.epoch + 1, 0

    def _record(self) -> None:
        """What belongs behind a step: its records, an evaluation, a checkpoint. After an interrupt the rest is due."""
        settings, is_last = self.settings, self.step == self.num_steps
        if self.num_losses and (self.step % settings.log_every == 0 or is_last):
            self._add_training()
        if not is_last:  # what was added then is written with the results at the end
            if settings.eval_every and self.step % settings.eval_every == 0:
                self._add_evaluation(self._evaluate(self.eval_split, exact=False), is_last=False)
                self._add_memory()
            self.log.write(self.step)
        self.records_due = False
        if not is_last and settings.checkpoint.every and self.step % settings.checkpoint.every == 0:
            self._save_meanwhile()

    def _train_step(self, batch: "Batch") -> None:
        self._set_rates(self.step)
        self.run_step(batch)
        self.step += 1
        if self.average is not None and self.step > self.settings.average_from * self.num_steps:
            self.average.step()
        self.sample += len(batch.labels)
        self.num_samples += len(batch.labels)
        self.num_losses += 1
        self.progress.advance(len(batch.labels))

    def _set_rates(self, step: int) -> None:
        """Learning rates as in the step after so many."""
        factor = self.settings.learning_rate_factor(step, self.num_steps)
        for name, optimizer in self.optimizers.items():
            for group, rate in zip(optimizer.param_groups, self.full_rates[name], strict=True):
                group["lr"] = rate * factor

    def _eager_step(self, batch: "Batch") -> None:
        self._backward(batch)
        self.gradient_bytes = max(self.gradient_bytes, memory.gradient_bytes(self.model.embeddings.parameters()))
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()

    def _backward(self, batch: "Batch") -> None:
        """Forward, loss and backward, in which fused embeddings step too. On CUDA nothing here waits for the device."""
        logits, labels = predict(self.model, batch, self.settings)
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        self.guards.check_loss(loss, batch.dense, batch.labels)  # on CUDA losses are looked at by _add_training
        loss.backward()
        self.guards.check_gradients()
        self.loss_sum += loss.detach()

    def _make_step(self) -> Callable[["Batch"], None]:
        uses_graph = self.settings.cuda_graph is not False and torch.device(self.settings.device).type == "cuda"
        return self._graphed_step() if uses_graph else self._eager_step

    def _graphed_step(self, graphs=None) -> Callable[["Batch"], None]:
        """The step as replays of a CUDA graph, or, saying why, as it is. Raises ValueError if a graph was asked for."""
        dense_optimizer, embedding_optimizer = self.optimizers.values()
        try:
            if not self.model.embeddings.is_fused:
                raise ValueError("the embeddings' step outside the backward pass (optimizer.fused=true)")
            if not native.ensure():
                raise ValueError("the reference kernels, which wait for the device (native=require)")
            dense_step = DenseStep(dense_optimizer)
        except ValueError as error:
            if self.settings.cuda_graph is True:
                raise ValueError(f"trainer.cuda_graph=true: a graph cannot hold {error}") from error
            print(f"cuda graph: none, steps are launched one by one: a graph cannot hold {error}")
            return self._eager_step

        def launch(batch: "Batch") -> None:
            dense_optimizer.zero_grad()  # a capture that failed half-way may have left some
            self._backward(batch)
            dense_step()
            dense_optimizer.zero_grad()

        return GraphedStep(
            launch,
            prepare=dense_step.prepare,
            counted=embedding_optimizer.counted,
            check=self.model.embeddings.raise_noted,
            graphs=graphs or CudaGraphs(self.settings.device),
        )

    def _add_training(self) -> None:
        loss = self.loss_sum.item() / self.num_losses  # the only wait for the device
        self.model.embeddings.raise_noted()
        if not math.isfinite(loss):  # a sum with one NaN or infinity is none: all losses were looked at
            raise FloatingPointError(
                f"the loss is not finite in steps {self.step - self.num_losses + 1} to {self.step}; "
                "trainer.log_every=1 finds the step, device=cpu also the tensor"
            )
        if words := self.guards.spike(loss):
            self._say(f"step {self.step:,}: {words}")
        self.loss_sum.zero_()
        self.num_losses = 0
        now, (last_time, last_samples) = time.perf_counter() - self.eval_seconds, self.last_log
        self.last_log = (now, self.num_samples)
        values = {
            "train/loss": loss,
            "train/samples_per_second": (self.num_samples - last_samples) / (now - last_time),
            "train/learning_rate": self.optimizers["dense_optimizer"].param_groups[0]["lr"],
            "train/embedding_learning_rate": self.optimizers["embedding_optimizer"].param_groups[0]["lr"],
        }
        self.log.add(values, {})
        self.progress.show(f"step {self.step:,} loss {loss:.4f}")

    def _evaluate(self, split: str, *, exact: bool) -> Evaluation:
        check = self.interrupt.check
        with self._evaluating():
            return evaluate(self.model, self.dataset, split, settings=self.settings, check=check, exact=exact)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside, the model has the weights that are evaluated, their mean if the run averages; no training time."""
        began = self._now()
        try:
            with nullcontext() if self.average is None else self.average.applied():
                yield
        finally:
            self.eval_seconds += self._now() - began

    def _add_evaluation(self, evaluation: Evaluation, *, is_last: bool) -> None:
        """Logs eval/*, says it, and says so loudly when the constant predictor is as good; keeps the best weights."""
        (values, reasons), split = evaluation.values(), self.eval_split
        self.log.add(_tagged("eval", values), _tagged("eval", reasons))
        self.log.precision_recall("eval/precision_recall", evaluation.metrics.precision_recall(), self.step)
        self._say(
            f"step {self.step:,}  {split} AUC {values['auc']:.5f} (+-{values['auc_bound']:.0e})  "
            f"log loss {values['log_loss']:.5f}  normalized entropy {values['normalized_entropy']:.4f}"
        )
        entropy = values["normalized_entropy"]
        self.beats_constant_predictor = None if math.isnan(entropy) else entropy < 1
        if entropy >= 1 and (is_last or not self.has_warned):
            self.has_warned = True
            self._say(NOT_LEARNED.format(entropy=entropy, split=split, step=self.step))
        if self.best is not None:
            with self._evaluating():
                self.best.offer(self.model, values["auc"], self.step)
            if self.best.step == self.step and self.best.error is not None:
                self._say(f"the weights of step {self.step:,}, the best so far, are not kept: {self.best.error}")

    def _evaluate_at_end(self) -> None:
        """Evaluates on both splits, on test the best weights too; test/auc is exact."""
        self.interrupt.check()
        on_test = self._evaluate("test", exact=True)
        self._add_evaluation(
            on_test if self.eval_split == "test" else self._evaluate(self.eval_split, exact=False), is_last=True
        )
        values, reasons = on_test.exact_values(self.dataset.best_possible_auc("test"))
        self.log.add(_tagged("test", values), _tagged("test", reasons))
        self.log.precision_recall("test/precision_recall", on_test.metrics.precision_recall(), self.step)
        del on_test  # its scores, before others come
        with self._evaluating():
            batch = next(iter(self.dataset.batches("train", NUM_SAMPLES)))
            add_feature_histograms(self.log, self.model.embeddings, batch, self.step, self.settings)
        if self.best is not None and self.best.step is not None:
            self._add_test_at_best(values, reasons)

    def _add_test_at_best(self, values: dict[str, float], reasons: dict[str, str]) -> None:
        """Logs test/* of the best weights, which replace the evaluated ones. values, reasons: of the last ones."""
        if self.best.step != self.step:
            try:
                with self._evaluating():
                    self.best.load(self.model)
            except (ValueError, OSError) as error:
                values, reasons = {"auc": math.nan}, {"auc": f"the weights of the best step are not there: {error}"}
            else:
                on_test = self._evaluate("test", exact=True)
                values, reasons = on_test.exact_values(self.dataset.best_possible_auc("test"))
        self.log.add(_tagged("test_at_best", values | {"step": self.best.step}), _tagged("test_at_best", reasons))

    def _add_memory(self) -> None:
        embeddings = self.model.embeddings
        values = {
            "embedding_bytes": embeddings.num_bytes(),
            "state_bytes": embeddings.state_bytes(),
            "optimizer_bytes": sum(map(memory.optimizer_bytes, self.saved.values())),
            "gradient_bytes": self.gradient_bytes,
            "serving_bytes": memory.tensor_bytes(self.model.state_dict().values()),
            "peak_bytes": memory.peak_bytes(self.settings.device),
            "compression": embeddings.num_bytes() / embeddings.dense_equivalent_bytes(),
        }
        self.log.add(_tagged("memory", values), {})

    def _ledger(self) -> list[dict]:
        """The embeddings' bytes by feature; those of optimizers are there once they have stepped."""
        return memory.ledger(self.model.embeddings, self.saved.values(), self.settings.batch_size)

    def _counters(self) -> dict:
        """The loop's state beside the tensors: what `resume` reads."""
        self.log.flush()  # records are never behind a checkpoint
        return {
            "step": self.step,
            "num_steps": self.num_steps,
            "epoch": self.epoch,
            "sample": self.sample,
            "fingerprint": self.dataset.fingerprint,
            "identity": self.identity,
            "rows": self.log.num_rows,
            "pending": self.log.pending,
            "loss_sum": self.loss_sum.item(),
            "num_losses": self.num_losses,
            "gradient_bytes": self.gradient_bytes,
            "has_warned": self.has_warned,
            "records_due": self.records_due,
            "recent_losses": list(self.guards.recent_losses),
            "samples": self.num_samples,
            "train_seconds": self._trained_for(),
            "seconds": time.perf_counter() - self.began,
        }

    def _save_meanwhile(self) -> None:
        """Begins a checkpoint; one that cannot be written is said, and the next one tried."""
        for begin in (self.checkpoints.wait, lambda: self.checkpoints.begin(self._counters())):
            try:
                begin()
            except OSError as error:
                last = self.checkpoints.last
                where = "none is there yet" if last is None else f"the last one is {last}"
                self._say(f"step {self.step:,}: a checkpoint could not be written: {error}; {where}")

    def _save(self) -> dict:
        """What the summary says of the checkpoint, once it is saved; without it the results are still worth having."""
        try:
            try:
                self.checkpoints.wait()
            except OSError as error:
                self._say(f"a checkpoint could not be written: {error}")
            finally:
                self.checkpoints.release()
            counters = self._counters()
            try:
                self.checkpoints.save(counters)
            except OSError:
                if self.best is None or not self.best.give_way():
                    raise
                self._say("no room for the checkpoint beside the best weights: they are removed")
                self.checkpoints.save(counters)
        except OSError as error:
            self._say(NOT_SAVED.format(error=error))
            return {"checkpoint_error": str(error)}
        path = self.checkpoints.last
        files = [file.stat().st_size for file in path.iterdir()]
        return {"checkpoint": str(path), "checkpoint_bytes": sum(files)}

    def _facts(self) -> dict:
        """What summary.json says beside the tags, as of now."""
        device = torch.device(self.settings.device)
        return {
            "data": self.dataset.describe(),
            "data_fingerprint": self.dataset.fingerprint,
            "eval_split": self.eval_split,
            "best_weights": None if self.best is None or self.best.kept is None else str(self.best.kept),
            "steps": self.step,
            "epochs": self.epoch + self.sample / self.num_train,
            "samples": self.num_samples,
            "samples_per_second": self.num_samples / self.train_seconds if self.train_seconds else 0.0,
            "train_seconds": self.train_seconds,
            "beats_constant_predictor": self.beats_constant_predictor,
            "dense_equivalent_bytes": self.model.embeddings.dense_equivalent_bytes(),
            "features": self._ledger(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "precision": self.settings.precision,
            "folder": str(self.log.folder),
        }

    def _say(self, words: str) -> None:
        self.progress.write(words)

    def _now(self) -> float:
        """Seconds, once the device has done what it was told: else its work would be counted to whoever comes next."""
        if torch.device(self.settings.device).type == "cuda":
            torch.cuda.synchronize(self.settings.device)
        return time.perf_counter()


def _tagged(tag: str, values: dict) -> dict:
    return {f"{tag}/{name}": value for name, value in values.items()}


@contextmanager
def _deterministic(is_on: bool) -> Iterator[None]:
    """Has torch refuse operations that do not repeat bit for bit; a sweep's next run, in this process, is as it was."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(is_on or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Under tf32 CUDA multiplies float32 matrices with 10 bits of each number; elsewhere this has no effect."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
