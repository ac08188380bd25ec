"""Trains a tokenizer with the recipe of XQ-GAN (Li et al. 2024); goes on after a kill.

python examples/train_tokenizer.py --config laptop                    photographs, no GPU
python examples/train_tokenizer.py --config msvr10p2_4096 --data DIR  a released configuration
torchrun --nproc_per_node 8 examples/train_tokenizer.py ...           the same on 8 GPUs
python examples/train_tokenizer.py --config FILE --data.batch 64      any setting

examples/configs/defaults.toml has all settings. The same command again continues. Written to --out:
tokenizer/ (averaged weights at their best), checkpoints/, metrics.jsonl, tensorboard/, pictures/.
"""

import argparse
import contextlib
import copy
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common.adm import BrokenPicture
from common.config import command_line, differences, names, read_config
from common.evaluation import draw, evaluate
from common.journal import Journal
from common.learning import clip_
from common.pace import Pace
from common.parallel import waiting
from common.run import Run
from common.stream import held_out_batches, training_batches
from common.usage import usage_by_part
from torch import Tensor
from tqdm import tqdm

from xq.distributed import all_reduce_sum_
from xq.models import merge_lora_
from xq.quantizers import accumulating

# options that are short for settings
SHORT = {
    "data": "data.train",
    "val": "data.val",
    "init": "model.init",
    "steps": "run.steps",
    "seed": "run.seed",
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Sets up, goes on from a checkpoint if there is one, trains; the last evaluation."""
    try:
        config, out = _settings(arguments)
        run = Run(config, out)
        found = run.checkpoints.load()
        if found is not None:
            run.load(found)
        else:
            run.start()
        if run.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            journal = Journal(out, run.step, run.config.log, config)
            _introduce(run, found)
        else:
            journal = None
    except (ImportError, OSError, ValueError) as error:
        sys.exit(str(error))
    if run.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        return train(run, journal)
    except (OSError, BrokenPicture) as error:
        sys.exit(f"step {run.step}: {error}; {_again(run)}")
    except KeyboardInterrupt:
        sys.exit(f"stopped at step {run.step}; {_again(run)}")
    finally:
        if journal is not None:
            journal.close()
        if torch.distributed.is_initialized():
            run.processes.destroy_process_group()


def train(run: Run, journal: Journal | None) -> dict[str, Any]:
    """Does the steps that are left, and what belongs between them; the last evaluation."""
    config, numbers = run.config, dict[str, Any]()
    steps = range(run.step, run.total)
    batches = training_batches(run.crops, steps, run.rank, run.world)
    bar = tqdm(total=run.total, initial=run.step, disable=run.rank > 0, smoothing=0.05)
    pace = Pace()
    for _ in steps:
        run.begin_step()
        terms = step(run, batches, pace)
        pace.lap()
        run.step += 1
        done, last = run.step, run.step == run.total
        due = last or done % config.save.every == 0
        # no weights are kept of which nothing was looked at
        if done % config.log.every == 0 or due:
            shown = _shown(run, terms)
            speed = pace.read(config.data.batch)
            if not all(map(math.isfinite, shown.values())):
                sys.exit(f"step {done}: not all is finite: {shown}; lower optimizer.lr, or clip")
            if journal is not None:
                lr = run.optimizers[0].param_groups[0]["lr"]
                journal.add(done, loss=shown, lr=lr, speed=speed)
            bar.set_postfix_str(
                f"loss {shown['total']:.4f}, {speed['images']:.0f} images/s, "
                f"step {speed['step']:.3f} s of which data {speed['data']:.3f} s"
            )
        bar.update()
        better = False
        if done % config.eval.every == 0 or last:
            numbers, better = _evaluate(run, journal)
        if due or better:
            state = run.state()
            if run.rank == 0:
                run.checkpoints.save(done, state, run.best["step"])
            run.processes.wait_for_everyone()
        pace.resume()
    bar.close()
    if run.rank == 0:
        print(f"{run.total} steps are done; the tokenizer is in {run.out / 'tokenizer'}")
    return numbers


def step(run: Run, batches: Iterator[Any], pace: Pace) -> dict[str, Tensor]:
    """One step of both networks, over all micro-batches; their terms, of this process."""
    config, device, objective = run.config, run.device, run.objective
    judges, count = objective.judges(run.step), config.data.accumulate
    run.learner.train()
    sums: dict[str, Tensor] = {}
    for micro in range(count):
        with pace.loading():
            images, skipped = next(batches)
        run.report(skipped)
        images = images.to(device, non_blocking=True)
        with contextlib.ExitStack() as stack:
            if micro < count - 1:
                # gradients and codes move with the last micro-batch
                stack.enter_context(accumulating(run.tokenizer))
                for module in (run.parallel, run.parallel_judge):
                    stack.enter_context(waiting(module))
            bf16 = torch.autocast(device.type, torch.bfloat16, enabled=config.run.bf16)
            with bf16:
                made, indices, losses, aligned = run.parallel(images)
                made = made.float()
                total, terms = objective.of_tokenizer(
                    images, made, losses, aligned, run.last_layer, run.step
                )
            (total / count).backward()
            terms = {"total": total.detach(), **terms}
            if judges:
                assert run.parallel_judge is not None
                with bf16:
                    loss, more = objective.of_discriminator(run.parallel_judge, images, made)
                (loss / count).backward()
                terms |= more
            run.usage.update(indices)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.double() / count
    modules = [run.learner, run.judge][: 1 + judges]
    for name, module, optimizer in zip(("", "_judge"), modules, run.optimizers, strict=False):
        assert module is not None
        # averaged over processes already
        sums[f"gradient{name}"] = clip_(module, config.optimizer.clip).double()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.average.update(run.tokenizer, run.step)
    return sums


def _evaluate(run: Run, journal: Journal | None) -> tuple[dict[str, Any], bool]:
    """Measures the averaged weights; writes them where they are the best so far."""
    config, tokenizer = run.config, run.average.whole()
    batches = held_out_batches(
        run.held_out, config.eval.batch, config.eval.pictures, run.rank, run.world
    )
    numbers = evaluate(tokenizer, run.reported(batches), run.perceptual, run.device)
    trained_on = run.usage.compute()
    numbers["used in training"] = usage_by_part(trained_on.used, tokenizer.quantizer)
    run.usage.reset()
    better = numbers["distance"] < run.best["distance"]
    if better:
        run.best = {"step": run.step, "distance": numbers["distance"]}
    if journal is not None:
        journal.add(run.step, held_out=numbers)
        tqdm.write(f"step {run.step}: held out {numbers['psnr']:.2f} dB" + " (best)" * better)
        places = torch.linspace(0, len(run.held_out) - 1, min(config.eval.shown, len(run.held_out)))
        images = torch.stack([run.held_out[int(place)][0] for place in places]).to(run.device)
        for file in draw(tokenizer, images, run.out / "pictures", run.step):
            journal.add_picture(run.step, file.stem.partition("-")[0], file)
        if better:
            plain = copy.deepcopy(tokenizer)
            if any(getattr(part, "lora", None) for part in plain.modules()):
                merge_lora_(plain)
            plain.save_pretrained(run.out / "tokenizer")
    return numbers, better


def _shown(run: Run, terms: dict[str, Tensor]) -> dict[str, float]:
    """The terms' means over processes, on the host."""
    values = torch.stack([terms[name].to(run.device) for name in terms]) / run.world
    all_reduce_sum_([values])
    return dict(zip(terms, values.tolist(), strict=True))


def _again(run: Run) -> str:
    steps = run.checkpoints.steps()
    if not steps:
        return "there is no checkpoint yet, so the same command starts anew"
    return f"the same command goes on from step {steps[-1]}"


def _introduce(run: Run, found: dict[str, Any] | None) -> None:
    millions = sum(p.numel() for p in run.tokenizer.parameters()) / 1e6
    trains = sum(p.numel() for p in run.tokenizer.parameters() if p.requires_grad) / 1e6
    print(
        f"{millions:.2f} M parameters, {trains:.2f} M of them train; {len(run.crops)} pictures, "
        f"{len(run.held_out)} held out; {run.world} processes on {run.device}; steps {run.step} to "
        f"{run.total}, discriminator from {run.judged_from}; writes to {run.out}"
    )
    for text in differences(found["config"], run.settings) if found else ():
        print(f"goes on with other settings: {text}")


def _settings(arguments: Sequence[str] | None) -> tuple[dict[str, Any], Path]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help=f"a TOML file, or one of {', '.join(names())}")
    parser.add_argument("--out", help="folder of the training (runs/NAME of the configuration)")
    for name, setting in SHORT.items():
        parser.add_argument(f"--{name}", help=setting)
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases, too")
    parser.add_argument("--compile", action="store_true", help='model.compile = "inductor"')
    args, rest = parser.parse_known_args(arguments)
    changes = command_line(rest)
    changes += [(setting, value) for n, setting in SHORT.items() if (value := getattr(args, n))]
    changes += [("log.wandb", "true")] * args.wandb + [("model.compile", "inductor")] * args.compile
    config = read_config(args.config, changes)
    name = Path(args.config).stem if args.config else config["model"]["preset"] or "tokenizer"
    return config, Path(args.out or config["run"]["out"] or f"runs/{name}")


if __name__ == "__main__":
    main()
