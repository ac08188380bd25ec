import pytest
import torch
from torch import nn

from xq.models.checkpoints import Drop, Format, KeyTable, Rename, Split
from xq.quantizers import VQ, EMACodebook


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((6, 2), float(i)) for i, name in enumerate(names)}


def test_names_prefixes_and_digits():
    table = KeyTable(
        [
            Drop("counts"),
            Drop("teacher."),
            Drop("layers.{i}.unused"),
            Rename("codes", "quantizer.weight"),
            Rename("up.0.", "levels.1."),
            Rename("up.1.", "levels.0."),
            Rename("layers.{i}.heads.{j}.", "parts.{j}.blocks.{i}."),
            Rename("twice.{i}.of.{i}", "both.{i}"),
            Rename("", "rest."),
        ]
    )
    new = {
        "codes": "quantizer.weight",
        "up.0.a.weight": "levels.1.a.weight",
        "up.1.a": "levels.0.a",
        "layers.3.heads.12.a": "parts.12.blocks.3.a",
        "twice.4.of.4": "both.4",
        "other.x": "rest.other.x",
        "twice.4.of.5": "rest.twice.4.of.5",
        "layers.x.heads.1.a": "rest.layers.x.heads.1.a",
        "codes.more": "rest.codes.more",
    }
    state = tensors(*new, "counts", "teacher.a", "layers.7.unused")
    found = table.convert(state)
    assert found.keys() == set(new.values())
    for old, name in new.items():
        assert torch.equal(found[name], state[old])
    back = table.revert(found)
    assert back.keys() == new.keys()
    assert all(torch.equal(back[old], state[old]) for old in new)


def test_dots_are_dots():
    assert KeyTable([Rename("a.b", "c")]).unknown(["axb", "a.b", "a.b "]) == ["axb", "a.b "]


def test_other_shapes_and_parts():
    table = KeyTable(
        [
            Split("blocks.{i}.qkv", ("q.{i}", "k.{i}", "v.{i}")),
            Split("pair", ("x", "y"), torch.unbind, lambda parts: torch.stack(list(parts))),
            Rename("flat", "square", lambda t: t.view(2, 2), lambda t: t.flatten()),
        ]
    )
    state = {"blocks.5.qkv": torch.arange(6.0), "pair": torch.rand(2, 3), "flat": torch.rand(4)}
    found = table.convert(state)
    assert found["k.5"].tolist() == [2, 3]
    assert torch.equal(found["y"], state["pair"][1])
    assert found["square"].shape == (2, 2)
    back = table.revert(dict(reversed(found.items())))
    assert all(torch.equal(back[key], state[key]) for key in state)
    del found["k.5"]
    with pytest.raises(ValueError, match=r"only some of the parts of blocks\.5\.qkv"):
        table.revert(found)
    with pytest.raises(ValueError, match=r"splits blocks\.1\.qkv into 3 parts, .* \(4,\)"):
        table.convert({"blocks.1.qkv": torch.zeros(4)})


def test_the_first_rule_counts():
    table = KeyTable([Rename("a.b", "x"), Rename("a.", "y."), Rename("a.b", "y.b")])
    assert table.convert(tensors("a.b", "a.c")).keys() == {"x", "y.c"}
    assert table.revert(tensors("x", "y.c")).keys() == {"a.b", "a.c"}


def test_bad_state():
    table = KeyTable([Rename("a", "x"), Rename("b", "x"), Drop("c")])
    many = tensors(*(f"k{i}" for i in range(12)))
    with pytest.raises(
        ValueError, match=r"knows 12 of the other project's names not: k0, .*k7 and 4"
    ):
        table.convert(many)
    with pytest.raises(ValueError, match=r"two tensors for x, the second from b"):
        table.convert(tensors("a", "b"))
    with pytest.raises(ValueError, match=r"knows 1 of xq's names not: c"):
        table.revert(tensors("x", "c"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rename("a.", "b"), "renames a prefix to a name"),
        (Rename("a", "b."), "renames a prefix to a name"),
        (Split("a.", ("b", "c")), "renames a prefix to a name"),
        (Rename("a.{i}", "b"), "has other digits on one side"),
        (Rename("a.{i}", "b.{j}"), "has other digits on one side"),
        (Split("a.{i}", ("b.{i}", "c")), "has other digits on one side"),
    ],
)
def test_bad_rules(rule, message):
    with pytest.raises(ValueError, match=message):
        KeyTable([rule])


def format_of(module, *rules) -> Format:
    return Format(
        "own", "One's own", lambda state: True, lambda state: module(), lambda _: KeyTable(rules)
    )


def test_module_owns_its_tensors():
    own = format_of(lambda: nn.Linear(2, 6), Split("both", ("weight", "other")), Drop("c"))
    both = torch.rand(12, 2)
    with pytest.raises(ValueError, match="has 1 tensors left over"):
        format_of(lambda: nn.Linear(2, 6, bias=False), *own.table({}).rules).read({"both": both})
    linear = format_of(lambda: nn.Linear(2, 6), Rename("w", "weight"), Rename("b", "bias"))
    state = {"w": both[:6].half(), "b": both[0].repeat(3)}
    module = linear.read(state)
    assert not module.training
    assert module.weight.requires_grad
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, state["w"].float())
    with torch.no_grad():
        module.bias.zero_()
    assert state["b"].any()


def test_module_that_fits_differently():
    linear = format_of(lambda: nn.Linear(2, 6), Rename("", ""))
    with pytest.raises(
        ValueError, match=r"One's own lacks|One's own has no place for 0 .* lacks 1"
    ):
        linear.read({"weight": torch.zeros(6, 2)})
    with pytest.raises(ValueError, match=r"weight of shape \(6, 3\), the module asks for \(6, 2\)"):
        linear.read({"weight": torch.zeros(6, 3), "bias": torch.zeros(6)})
    with pytest.raises(ValueError, match=r"bias of torch.int64, not torch.float32"):
        linear.read({"weight": torch.zeros(6, 2), "bias": torch.zeros(6, dtype=torch.int64)})


class Scratch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vq = VQ(2, 4, codebook=EMACodebook)
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def test_what_is_in_no_file_is_made():
    source = Scratch()
    before = torch.random.get_rng_state()
    module = format_of(Scratch, Rename("", "")).read(source.state_dict())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(module.table, torch.arange(3.0))
    assert not any(buffer.is_meta for buffer in module.buffers())
    module.train().vq(torch.randn(20, 2))
    assert module.vq.codebook.step == 1
