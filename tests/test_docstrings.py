"""The examples in docstrings run, and public names explain themselves."""

import doctest
import importlib
import inspect
import re
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_public_api import PROMISED
from torch import nn

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "xq").rglob("*.py"))
EXAMPLES = [path for path in SOURCES if ">>> " in path.read_text()]
# what people look up first has an example that runs
EXAMPLED = """
    VQ LFQ BSQ FSQ IBQ GumbelVQ SimCodebook GradientCodebook EMACodebook ResidualQuantizer
    ProductQuantizer Pyramid DepthDropout ChannelFirst Projected Masked Perturbed initialize
    accumulating beam_encode keep_codes add_codes revive_in nearest sign_entropy pack
    RandomProjectionQuantizer Tokenizer CNNEncoder VAR AR RAR teacher_forcing load_checkpoint
    KeyTable adaptive_weight LeCam ramp LPIPS DiffAug FeatureAlignment ContrastiveLoss Composite
    CodebookUsage psnr ssim FrechetDistance to_images describe build TokenStore Pretrained
    check_quantizer
"""
NAMES = [(module, name) for module, names in PROMISED.items() for name in names.split()]
# a word that says it
PLAIN = {"self", "options", "args", "kwargs"}


def module_of(path: Path) -> ModuleType:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return importlib.import_module(".".join(parts).removesuffix(".__init__"))


def public() -> dict[str, Any]:
    """What examples need not import: torch, and every promised name."""
    found: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "partial": partial}
    for module, name in NAMES:
        found[name] = getattr(importlib.import_module(module), name)
    return found


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = module_of(path)
    # by the lines of the file: decorated functions do not look like the module's own
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    count = 0
    for test in finder.find(module, module.__name__, globs=public(), extraglobs=vars(module)):
        torch.manual_seed(0)
        runner.run(test, out=said.append)
        count += len(test.examples)
    assert count == len(re.findall(r"^ *>>> ", path.read_text(), re.M)), "an example is not found"
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("name", EXAMPLED.split())
def test_what_is_looked_up_first_has_an_example(name):
    assert re.search(r"^ *Examples:\n", inspect.getdoc(public()[name]) or "", re.M)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sections_are_plural(path):
    assert not re.search(r"^ *(Example|Arg|Raise|Return|Attribute|Note):$", path.read_text(), re.M)


def section(doc: str, title: str) -> str:
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n?|\n)*)", doc, re.M)
    return found[1] if found else ""


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[".".join(pair) for pair in NAMES])
def test_arguments_are_described(module, name):
    found = getattr(importlib.import_module(module), name)
    doc = inspect.getdoc(found) or ""
    if inspect.isclass(found) and issubclass(found, tuple):
        assert section(doc, "Attributes") or section(doc, "Args")
        return
    maker = found.__init__ if inspect.isclass(found) else found
    if maker in (object.__init__, nn.Module.__init__):
        return
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for parameter in inspect.signature(maker).parameters.values():
        if parameter.kind in variable or parameter.name in PLAIN:
            continue
        pattern = rf"^ +{parameter.name}:"
        assert re.search(pattern, section(doc, "Args"), re.M), f"{name} does not say {parameter}"
