"""A training set up from its settings: parts, data, steps, and the state that a checkpoint has."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from common.checkpoints import Checkpoints
from common.config import Config, as_namespace
from common.learning import Average, cosine_rate, make_optimizer, scaled
from common.objective import Judge, Learner, Objective
from common.parallel import (
    SharedAverage,
    check_sharding,
    gathered,
    in_parallel,
    load_optimizer_,
    revive_after_steps,
    share_out_,
)
from common.parts import (
    coloured,
    compile_,
    make_alignments,
    make_discriminator,
    make_perceptual,
    make_tokenizer,
    start_at_pca_,
)
from common.sources import find_source, split
from common.stream import Crops, check_batch, training_batches
from xq.distributed import all_reduce_sum_
from xq.losses import cooling_temperature
from xq.metrics import CodebookUsage
from xq.models import check_optimizer
from xq.quantizers import DepthDropout, Perturbed, initialize

# the least values of settings
_LEAST = {
    0: "data.per_class data.workers run.epochs run.steps run.seed optimizer.lr_batch "
    "optimizer.warmup_epochs optimizer.weight_decay optimizer.clip loss.reconstruction "
    "loss.perceptual loss.commitment loss.codebook loss.regularizer loss.adversarial "
    "discriminator.start discriminator.ramp discriminator.lecam discriminator.warmup_epochs "
    "discriminator.weight_decay semantic.weight detail.weight",
    1: "model.start_batches data.size data.window data.zoom log.every eval.every eval.batch "
    "eval.pictures eval.shown save.every",
}


class Run:
    """Everything a training step touches.

    Args:
        config: All settings.
        out: The folder of the run.

    Raises:
        ImportError: If something optional is missing.
        OSError: If files are.
        ValueError: If settings do not fit each other or what they name.
    """

    def __init__(self, config: Config, out: Path) -> None:
        self.settings, self.config, self.out = config, as_namespace(config), out
        self.processes: Any = PartialState(cpu=not torch.cuda.is_available())
        self.device: torch.device = self.processes.device
        self.rank, self.world = self.processes.process_index, self.processes.num_processes
        self._check()
        torch.manual_seed(self.config.run.seed)
        self._read_data()
        self._count_steps()
        self._build()
        self.checkpoints = Checkpoints(
            out / "checkpoints", self.config.save.last, self.config.save.on_error
        )
        self.step, self.best = 0, {"step": -1, "distance": float("inf")}

    @property
    def tokenizer(self) -> Any:
        """As it learns, not averaged."""
        return self.learner.tokenizer

    @property
    def last_layer(self) -> Any:
        """What makes the pixels, or None; of weights that are shared out, whole after a forward."""
        return getattr(self.tokenizer.decoder, "last_layer", None)

    def _check(self) -> None:
        check_batch(self.config.data, self.world)
        for least, names in _LEAST.items():
            for name in names.split():
                section, setting = name.split(".")
                if (value := self.settings[section][setting]) < least:
                    raise ValueError(f"{name} must be {least} or more, got {value}")
        if self.config.data.channels not in (1, 3):
            raise ValueError(f"data.channels is 1 or 3, got {self.config.data.channels}")
        betas = self.config.optimizer.betas
        if len(betas) != 2 or not all(isinstance(b, float) and 0 <= b < 1 for b in betas):
            raise ValueError(f"optimizer.betas are two numbers in [0, 1), got {betas}")
        if self.config.run.fsdp:
            check_sharding(self.device)
        if self.config.data.broken not in ("stop", "skip"):
            raise ValueError(f"data.broken is one of stop, skip; got {self.config.data.broken!r}")

    def _read_data(self) -> None:
        data, seed = self.config.data, self.config.run.seed
        # the first process indexes shards, the others read what it found
        with self.processes.main_process_first():
            train = find_source(data.train, self.out)
            name = data.val or ("demo held out" if data.train == "demo" else "")
            held_out = find_source(name, self.out) if name else None
        rows, held_out, held_rows = split(train, held_out, data.per_class, seed)
        self.crops = Crops(train, rows, data, seed)
        self.held_out = Crops(held_out, held_rows, data, None)

    def _count_steps(self) -> None:
        run, per_epoch = self.config.run, len(self.crops) / self.config.data.batch
        self.total = run.steps or round(run.epochs * per_epoch)
        if self.total < 1:
            raise ValueError(f"run.epochs = {run.epochs} are no step; set run.steps or more epochs")
        self.per_epoch = per_epoch
        self.judged_from = round(self.config.discriminator.start * per_epoch)

    def _build(self) -> None:
        config, device = self.config, self.device
        tokenizer = make_tokenizer(config.model).to(device)
        alignments = make_alignments(config, tokenizer).to(device)
        branches = {name: getattr(config, name).branch for name in alignments}
        self.learner = Learner(tokenizer, alignments, branches, self._dropout(tokenizer))
        self.average = Average(tokenizer, config.optimizer.ema)
        discriminator = make_discriminator(config.discriminator)
        self.judge = None if discriminator is None else Judge(discriminator).to(device)
        perceptual = make_perceptual(config.loss)
        self.perceptual = None if perceptual is None else perceptual.to(device)
        self.objective = Objective(config, self.perceptual, self.judge, self.judged_from)
        self.objective.lecam.to(device)
        adaptive = self.judge is not None and config.discriminator.adaptive
        if adaptive and self.last_layer is None:
            raise ValueError(
                f"discriminator.adaptive needs a decoder with a last_layer, which "
                f"{type(tokenizer.decoder).__name__} has not"
            )
        self.usage = CodebookUsage.of(tokenizer.quantizer).to(device)
        self._try()
        if config.model.compile:
            compile_(tokenizer, config.model.compile)

    @torch.no_grad()
    def _try(self) -> None:
        """Shows all networks plain pictures: what does not fit is told now, not at its start.

        Raises:
            ValueError: If something does not fit.
        """
        data = self.config.data
        # two, since some norms want company
        images = torch.zeros(2, data.channels, data.size, data.size, device=self.device)
        networks = [network for network in (self.learner, self.judge) if network is not None]
        try:
            for network in networks:
                network.eval()
            made, *_ = self.learner(images)
            if made.shape != images.shape:
                raise ValueError(f"the decoder makes pictures of shape {tuple(made.shape[1:])}")
            if self.perceptual is not None:
                self.perceptual(coloured(made), coloured(images))
            if self.judge is not None:
                self.judge(coloured(images), coloured(made))
        except (RuntimeError, ValueError) as error:
            kind = "colour" if data.channels == 3 else "grey"
            raise ValueError(
                f"{kind} pictures of {data.size} x {data.size} (data.channels, data.size) do not "
                f"go through: {error}"
            ) from error
        finally:
            for network in networks:
                network.train()

    def _dropout(self, tokenizer: Any) -> DepthDropout | None:
        settings, depth = self.config.dropout, tokenizer.quantizer.depth
        if settings.p == 0:
            return None
        if depth == 1:
            raise ValueError("dropout.p needs a quantizer with several steps or scales")
        return DepthDropout(depth, settings.p, settings.minimum)

    def _make_optimizers(self) -> list[torch.optim.AdamW]:
        config, batch = self.config.optimizer, self.config.data.batch
        learns: list[tuple[nn.Module, float, float]] = [
            (self.learner, config.lr, config.weight_decay)
        ]
        if self.judge is not None:
            judged = self.config.discriminator
            learns.append((self.judge, judged.lr, judged.weight_decay))
        found = []
        for module, lr, decay in learns:
            lr = scaled(lr, batch, config.lr_batch)
            found.append(make_optimizer(module, lr, tuple(config.betas), decay))
            check_optimizer(module, found[-1])
        self.peaks = [optimizer.defaults["lr"] for optimizer in found]
        return found

    def begin_step(self) -> None:
        """Sets what depends on the step alone: draws, rates, temperatures."""
        step, config = self.step, self.config
        # seeded anew, a step draws the same whatever came before, so no state of it is kept
        seeds = np.random.SeedSequence((config.run.seed, step, self.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        warmups = (config.optimizer.warmup_epochs, config.discriminator.warmup_epochs)
        starts = (0, self.judged_from)
        for optimizer, peak, first, epochs in zip(
            self.optimizers, self.peaks, starts, warmups, strict=False
        ):
            low, end = (min(peak, x) for x in (config.optimizer.warmup_lr, config.optimizer.min_lr))
            warmup, rates = round(epochs * self.per_epoch), (low, peak, end)
            rate = cosine_rate(step, first=first, last=self.total, warmup=warmup, rates=rates)
            for group in optimizer.param_groups:
                group["lr"] = rate
        progress = step / self.total
        alignments: Any = self.learner.alignments
        for name, alignment in alignments.items():
            part = getattr(config, name)
            if part.cool_to:
                alignment.loss.temperature = cooling_temperature(
                    progress, start=part.temperature, end=part.cool_to
                )
        for module in self.tokenizer.modules():
            if isinstance(module, Perturbed):
                module.progress = progress

    def start(self) -> None:
        """Sets linear parts and codebooks by the first batches, where `model` asks for it."""
        model = self.config.model
        if not model.init and (model.pca or model.kmeans):
            self._fit()
        self._join()

    @torch.no_grad()
    def _fit(self) -> None:
        model, tokenizer = self.config.model, self.tokenizer.eval()
        steps = range(model.start_batches)
        batches = self.reported(training_batches(self.crops, steps, self.rank, self.world))
        images = [images.to(self.device) for images, _ in batches]
        if model.pca:
            start_at_pca_(tokenizer, torch.cat(images))
        if model.kmeans:
            initialize(tokenizer.quantizer, torch.cat([*map(tokenizer.encoder, images)]))
        self.average = Average(tokenizer, self.config.optimizer.ema)

    def _join(self) -> None:
        """Lets processes work together on what is set by now."""
        self.parallel: Any = self.learner
        if self.config.run.fsdp:
            share_out_(self.learner, self.device)
            self.average = SharedAverage(self.average, self.tokenizer)
        else:
            self.parallel = in_parallel(self.learner, self.device)
        self.parallel_judge = self.judge and in_parallel(self.judge, self.device)
        self.optimizers = self._make_optimizers()
        if self.config.run.fsdp:
            revive_after_steps(self.optimizers[0], self.tokenizer)

    def report(self, skipped: list[str]) -> None:
        """Tells of pictures that were skipped."""
        for text in skipped:
            tqdm.write(f"skipped: {text}", file=sys.stderr)
        if skipped:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "skipped.txt").open("a") as file:
                file.writelines(f"{text}\n" for text in skipped)

    def reported(
        self, batches: Iterator[tuple[Tensor, list[str]]]
    ) -> Iterator[tuple[Tensor, list[str]]]:
        """The same batches; what was skipped in them is told."""
        for images, skipped in batches:
            self.report(skipped)
            yield images, skipped

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; every process must ask for it."""
        counts = self.usage.counts.clone()
        all_reduce_sum_([counts])
        state = {
            "step": self.step,
            "best": self.best,
            "config": self.settings,
            "tokenizer": self.tokenizer.state_dict(),
            "average": self.average.means(),
            "alignments": self.learner.alignments.state_dict(),
            "judge": self.judge.state_dict() if self.judge else {},
            "lecam": self.objective.lecam.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "usage": counts,
        }
        return gathered(state, keep=self.rank == 0)

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            ValueError: If it is that of other parts.
        """
        try:
            self.tokenizer.load_state_dict(state["tokenizer"])
            self.average.module.load_state_dict(state["average"])
            self.learner.alignments.load_state_dict(state["alignments"])
            if self.judge:
                self.judge.load_state_dict(state["judge"])
            self.objective.lecam.load_state_dict(state["lecam"])
            self._join()
            for optimizer, found in zip(self.optimizers, state["optimizers"], strict=True):
                load_optimizer_(optimizer, found)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.checkpoints.folder} holds checkpoints of other parts; take another "
                f"--out, or the former settings ({error})"
            ) from error
        if self.rank == 0:
            self.usage.counts.copy_(state["usage"])
        self.step, self.best = state["step"], state["best"]
