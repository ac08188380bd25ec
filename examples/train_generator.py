"""Trains a generator on the tokens of a data set; the same command goes on after a kill.

python examples/train_generator.py --tokens STORE --tokenizer DIR               next scale, VAR
python examples/train_generator.py --tokens STORE --tokenizer DIR --model ar    next token, AR
python examples/train_generator.py --tokens STORE --tokenizer DIR --model rar   in random orders
torchrun --nproc_per_node 4 examples/train_generator.py ...                     a share each
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common.generators import (
    Generator,
    Objective,
    given_for,
    make_generator,
    save_generator,
)
from common.learning import Average, clip_, cosine_rate, make_optimizer
from common.network import SmallDecoder, SmallEncoder
from common.resume import Records, load_checkpoint, save_checkpoint
from common.split import split
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from xq.models import RAR, Tokenizer, random_share
from xq.token_store import TokenStore

# points of the curve, the last at the end
EVALUATIONS = 10
LOG_EVERY = 10
CHUNK = 1 << 14
BETAS, CLIP = (0.9, 0.95), 2.0
# where the learning rate ends, as a share of the highest
FINAL = 0.01
KINDS = ("var", "var-bits", "ar", "rar")
# from when to when the share of random orders falls, as shares of all steps, as in the paper of RAR
ANNEALED = (0.5, 0.75)
# what may differ when a training goes on
FREE = ("out", "tokens", "tokenizer", "save_every")


class Data:
    """Rows of a store: batches that follow from the step alone, and those held out.

    Args:
        store: Tokens and labels.
        size: Rows of a batch.
        seed: Of the orders, an order an epoch.

    Raises:
        ValueError: If there are no rows, or too few for a batch.
    """

    def __init__(self, store: TokenStore, size: int, seed: int) -> None:
        if not len(store):
            raise ValueError("the store has no rows; examples/encode_dataset.py appends them")
        self.store, self.size, self.seed = store, size, seed
        self.rows, self.held_out = split(len(store))
        if len(self.rows) < size:
            raise ValueError(f"a batch has {size} rows, and there are {len(self.rows)} to train on")
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)

    def batch(self, step: int) -> list[int]:
        """The rows of a step; what is left of an epoch and fills no batch is left out."""
        epoch, place = divmod(step, len(self.rows) // self.size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.rows), generator=generator)
        chosen = self.order[place * self.size : (place + 1) * self.size]
        return [self.rows[i] for i in chosen.tolist()]

    def read(self, rows: Sequence[int]) -> tuple[Int[Tensor, "b ..."], Int[Tensor, " b"]]:
        """Tokens and classes, -1 for none."""
        found = [self.store[row] for row in rows]
        labels = torch.tensor([label for _, label in found])
        return torch.stack([tokens for tokens, _ in found]), labels


def main(arguments: Sequence[str] | None = None) -> float:
    """Trains, and writes metrics, checkpoints and the generator; returns the last loss."""
    args = _parse(arguments)
    cpu = not torch.cuda.is_available()
    bf16 = not cpu and torch.cuda.is_bf16_supported() if args.bf16 is None else args.bf16
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if bf16 else "no")
    out = Path(args.out or f"runs/{args.model}")
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    torch.manual_seed(args.seed)
    try:
        # your tokenizer's own classes go here
        classes = [SmallEncoder, SmallDecoder]
        tokenizer = Tokenizer.from_pretrained(args.tokenizer, classes=classes)
        quantizer = tokenizer.quantizer.to(accelerator.device)
        data = Data(TokenStore(args.tokens, quantizer), args.batch, args.seed)
        processes = accelerator.num_processes
        if args.batch % processes:
            raise ValueError(f"{processes} processes cannot share {args.batch} rows evenly")
        sizes = {"depth": args.depth, "width": args.width, "heads": args.heads}
        model = make_generator(
            args.model,
            quantizer,
            data.store.token_shape,
            classes=count_classes(data.store, args.classes),
            dropout=args.dropout,
            # see `Training.learn`
            class_drop=0.0,
            **sizes,
        )
        checkpoint = load_checkpoint(out / "checkpoint.pt", settings)
    except (OSError, ValueError) as error:
        sys.exit(f"--tokens {args.tokens}, --tokenizer {args.tokenizer}: {error}")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    accelerator.print(
        f"{args.model}, {size:.2f} M parameters; {len(data.rows)} rows of tokens "
        f"{data.store.token_shape}, {len(data.held_out)} held out\n{processes} x "
        f"{accelerator.device}, {'bfloat16' if bf16 else 'float32'}; writes to {out}"
    )
    run = Training(accelerator, model.to(accelerator.device), quantizer, data, args)
    if checkpoint:
        run.restore(checkpoint)
        accelerator.print(f"goes on at step {run.step}")
    run.to_the_end(out, settings)
    loss = run.held_out()
    if accelerator.is_main_process:
        save_generator(run.average.module, quantizer, out / "generator")
    accelerator.print(f"held out: {loss:.4f} nats an index; {out / 'generator'} is the generator")
    accelerator.end_training()
    return loss


class Training:
    """A generator, its running average, and how it learns.

    Args:
        accelerator: Of this process.
        model: The generator.
        quantizer: Whose tokens it learns.
        data: The tokens.
        args: Of the command.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: Generator,
        quantizer: Any,
        data: Data,
        args: argparse.Namespace,
    ) -> None:
        self.accelerator, self.model, self.quantizer = accelerator, model, quantizer
        self.data, self.args, self.step = data, args, 0
        self.average = Average(model, args.ema)
        self.optimizer = make_optimizer(model, args.lr, BETAS, args.decay)
        self.objective = accelerator.prepare(Objective(model))

    def to_the_end(self, out: Path, settings: dict[str, Any]) -> None:
        """All steps that are left; metrics and checkpoints on the way."""
        args, main = self.args, self.accelerator.is_main_process
        records = Records(out / "metrics.jsonl", self.step) if main else None
        bar = tqdm(total=args.steps, initial=self.step, disable=not main)
        every = math.ceil(args.steps / EVALUATIONS)
        while self.step < args.steps:
            loss = self.learn()
            bar.update()
            found = {}
            if self.step % LOG_EVERY == 0:
                found["loss"] = float(self.accelerator.reduce(loss, "mean"))
                bar.set_postfix(loss=f"{found['loss']:.4f}")
            if self.step % every == 0:
                found["held_out_loss"] = self.held_out()
            if records and found:
                records.add(step=self.step, **found)
            if main and (self.step % args.save_every == 0 or self.step == args.steps):
                state = {"arguments": settings, **self.state()}
                save_checkpoint(out / "checkpoint.pt", state)
        bar.close()

    def learn(self) -> Float[Tensor, ""]:
        """One step; the loss of this process's share of the batch."""
        args, accelerator = self.args, self.accelerator
        rates = (0.0, args.lr, FINAL * args.lr)
        rate = cosine_rate(self.step + 1, first=0, last=args.steps, warmup=args.warmup, rates=rates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # what is random follows from the step, so that a run which goes on draws the same
        torch.manual_seed(args.seed * 1_000_003 + self.step)
        # and is drawn for the whole batch: on any number of processes the same rows have no class
        dropped = torch.rand(args.batch) < args.class_drop
        share = args.batch // accelerator.num_processes
        mine = slice(share * accelerator.process_index, share * (accelerator.process_index + 1))
        self.objective.train()
        orders = self.orders()
        order = None if orders is None else orders[mine].to(accelerator.device)
        rows = self.data.batch(self.step)[mine]
        loss = self.objective(*self.batch(rows, dropped[mine]), order)
        self.optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        clip_(self.model, CLIP)
        self.optimizer.step()
        self.average.update(self.model, self.step)
        self.step += 1
        return loss.detach()

    def orders(self) -> Int[Tensor, "b n"] | None:
        """In which order a RAR learns each row of the batch, at first any, in the end raster."""
        if not isinstance(self.model, RAR):
            return None
        start, end = (round(share * self.args.steps) for share in ANNEALED)
        return self.model.orders(self.args.batch, random_share(self.step, start, end))

    def batch(
        self, rows: Sequence[int], dropped: Bool[Tensor, " b"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `Objective` takes first, of these rows; those that are dropped get no class."""
        tokens, labels = self.data.read(rows)
        if dropped is not None:
            labels = labels.masked_fill(dropped, -1)
        tokens, labels = tokens.to(self.accelerator.device), labels.to(self.accelerator.device)
        return given_for(self.model, self.quantizer, tokens), labels, tokens

    @torch.no_grad()
    def held_out(self) -> float:
        """The averaged model's loss on the rows held out, of which each process takes some."""
        accelerator = self.accelerator
        mine = self.data.held_out[accelerator.process_index :: accelerator.num_processes]
        objective = Objective(self.average.module)
        total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        for start in range(0, len(mine), self.args.batch):
            rows = mine[start : start + self.args.batch]
            with accelerator.autocast():
                loss = objective(*self.batch(rows))
            total += torch.stack([loss.double() * len(rows), total.new_tensor(len(rows))])
        summed: Any = accelerator.reduce(total, "sum")
        return float(summed[0] / summed[1])

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` returned."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])


def count_classes(store: TokenStore, classes: int | None) -> int:
    """How many classes the rows have, or are said to have; one if none has a label.

    Raises:
        ValueError: If a label is none of so many.
    """
    highest = max(int(store[i : i + CHUNK][1].max()) for i in range(0, len(store), CHUNK))
    if classes is not None and highest >= classes:
        raise ValueError(
            f"labels go up to {highest}, so {classes} classes are too few, {highest + 1} the least"
        )
    return classes or max(highest + 1, 1)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", required=True, help="folder of a token store: examples/encode_dataset.py")
    add("--tokenizer", required=True, help="folder of the tokenizer that made it")
    add("--model", default="var", choices=KINDS, help="next scale, with a softmax or bit by bit")
    add("--classes", type=int, help="how many (as many as the labels)")
    add("--depth", type=int, default=6)
    add("--width", type=int, default=192)
    add("--heads", type=int, default=4)
    add("--steps", type=int, default=2000)
    add("--batch", type=int, default=64, help="of all processes together")
    add("--lr", type=float, default=1e-3, help="the highest, after the warm-up")
    add("--warmup", type=int, default=100, help="steps")
    add("--decay", type=float, default=0.05, help="of matrices; nothing else decays")
    add("--ema", type=float, default=0.998, help="decay of the averaged weights")
    add("--dropout", type=float, default=0.0, help="in a VAR, stochastic depth")
    add("--class-drop", type=float, default=0.1, help="how often no class is told")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (on a GPU)")
    add("--seed", type=int, default=0)
    add("--out", help="folder for what is written (runs/MODEL)")
    args = parser.parse_args(arguments)
    positive = ("depth", "width", "heads", "steps", "batch", "lr", "save_every", "classes")
    for name in positive:
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    return args


if __name__ == "__main__":
    main()
