"""The paper's comparisons at small scale: equal networks, crops and steps, stated bits.

python -m benchmarks.ablation                                scikit-image's photographs
python -m benchmarks.ablation --data DIR                     a folder, with train/ and val/ or not
    --lpips-weights FILE  --features-weights FILE            torchvision's AlexNet, a model of timm
"""

import argparse
import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import harness, terminal
from benchmarks.ablation_cases import Case, cases
from benchmarks.ablation_figure import draw
from benchmarks.ablation_judge import Judge, Networks
from benchmarks.ablation_run import Settings, trained
from benchmarks.ablation_table import METRICS, number, table
from benchmarks.harness import Options
from benchmarks.patches import split, words
from examples.common.data import CROP
from xq.losses import LPIPS, TimmTeacher

STEPS = 200
FEATURES = "tf_efficientnet_lite0"
QUICK = Settings(steps=3, batch=2, channels=8, shown=2, start=8, perceived=1)

BENCHMARK = harness.Benchmark(
    "ablation",
    "The paper's comparisons at small scale: equal networks, crops and steps",
    lambda device, quick: [],
    {},
    draw,
    table,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = _parser()
    given = parser.parse_args(arguments)
    options = harness.options(given)
    settings = replace(QUICK if options.quick else Settings(STEPS), **_asked(given))
    begun = time.monotonic()
    try:
        networks = _networks(given, options.device)
        seen, held_out = split(given.data)
        judge = Judge(held_out, networks)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    document = harness.opened(BENCHMARK, options)
    data = words(given.data, len(seen), len(held_out))
    document["shared"] = _shared(settings, networks, judge, data)
    print(f"{terminal.header(document)}\n{_said(document['shared'])}", flush=True)
    kept = _kept(_path(options), document["shared"])
    for case in cases(options.quick):
        if case.alignment and not networks.teacher:
            print(f"{case.name}: left out, it needs --features-weights", flush=True)
            continue
        key = _key(case)
        found = next((old for old in kept if old["key"] == key), None)
        late = given.minutes and time.monotonic() - begun > 60 * given.minutes
        if found is None and late:
            print(f"{case.name}, seed {case.seed}: left out, no minutes are left", flush=True)
            continue
        print(f"{case.name}, seed {case.seed}: ", end="", flush=True)
        found = found or {**trained(case, settings, seen, judge), "key": key}
        document["cases"].append(found)
        _save(document, options)
        print(_line(found), flush=True)
    harness.closed(BENCHMARK, document, options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser(BENCHMARK)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", default="demo", help='"demo", or a folder of pictures')
    parser.add_argument("--steps", type=_positive, help=f"of each training ({STEPS})")
    parser.add_argument("--batch", type=_positive, help=f"crops a step ({Settings(STEPS).batch})")
    parser.add_argument("--minutes", type=_positive, help="begin no training after so many")
    parser.add_argument("--lpips-weights", help="torchvision's AlexNet, a file")
    parser.add_argument("--lpips-heads", help="of LPIPS, a file; default: the lpips package's")
    parser.add_argument("--features", default=FEATURES, help=f"a model of timm ({FEATURES})")
    parser.add_argument("--features-weights", help="its weights, a file")
    # so that seconds of the CPU compare
    parser.set_defaults(threads=1)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _asked(given: Namespace) -> dict[str, int]:
    return {name: getattr(given, name) for name in ("steps", "batch") if getattr(given, name)}


def _networks(given: Namespace, device: str) -> Networks:
    """Those that there are weights of: nothing is downloaded."""
    lpips = teacher = crop_teacher = None
    if given.lpips_weights:
        lpips = LPIPS("alex", weights=given.lpips_weights, heads=given.lpips_heads).to(device)
    if given.features_weights:
        weights = given.features_weights
        teacher = TimmTeacher(given.features, weights=weights).to(device)
        crop_teacher = TimmTeacher(given.features, weights=weights, size=CROP).to(device)
    return Networks(lpips, teacher, crop_teacher, given.features if teacher else "", device)


def _shared(settings: Settings, networks: Networks, judge: Judge, data: str) -> dict[str, Any]:
    """What all cases have in common; another in any of it makes them all again."""
    return {
        "data": data,
        "squares": len(judge.all),
        "side": judge.side,
        "lpips": networks.lpips.net if networks.lpips else None,
        "features": networks.name or None,
        **settings.described(),
    }


def _said(shared: dict[str, Any]) -> str:
    side, crop = (f"{shared[name]} x {shared[name]}" for name in ("side", "crop"))
    lines = [
        f"{shared['data']}, in {shared['squares']} squares of {side}",
        f"{shared['steps']} steps of {shared['batch']} crops of {crop}",
    ]
    if not shared["lpips"]:
        lines.append("no --lpips-weights: LPIPS is neither trained with nor measured")
    if not shared["features"]:
        lines.append("no --features-weights: no Frechet distance, no alignment")
    return "\n".join(lines)


def _path(options: Options) -> Path:
    ending = "-cuda" if options.device == "cuda" else ""
    return options.out / f"{BENCHMARK.name}{ending}.json"


def _kept(path: Path, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of an earlier run in which the same was shared."""
    if not path.is_file():
        return []
    document = json.loads(path.read_text())
    return document["cases"] if document["shared"] == shared else []


def _key(case: Case) -> dict[str, Any]:
    return json.loads(json.dumps(case.described()))


def _save(document: dict[str, Any], options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    with harness.replacing(_path(options)) as path:
        path.write_text(json.dumps(document, indent=1) + "\n")


def _line(case: dict[str, Any]) -> str:
    numbers = [f"{name} {number(case, key)}" for key, name in METRICS.items() if case[key]]
    return f"{', '.join(numbers)}; {case['bits']:.0f} bits, {case['seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
