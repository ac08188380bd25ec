import ast
import importlib
import inspect
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import xq
import xq.metrics
from xq.quantizers import BSQ, ProductQuantizer, ResidualQuantizer

ROOT = Path(__file__).parents[1]
OPTIONAL = {"torchvision", "timm", "transformers", "open_clip", "peft", "lpips", "faiss", "triton"}
OPTIONAL |= {"huggingface_hub", "webdataset", "onnx", "onnxscript", "onnxruntime", "PIL"}
# what other people's code says; taking one away breaks it
PROMISED = {
    "xq": """
        VQ LFQ BSQ EMACodebook ResidualQuantizer Pyramid Refine ProductQuantizer DepthDropout
        FSQ ChannelFirst Projected Quantizer CodebookUsage Tokenizer TokenStore
    """,
    "xq.quantizers": """
        Quantized Losses Quantizer Wrapper fit VQ Codebook GradientCodebook EMACodebook LFQ BSQ
        ResidualQuantizer Pyramid Refine ProductQuantizer DepthDropout ChannelFirst Projected
        straight_through rotation_trick nearest accumulating sign_entropy entropy_in_bits
        initialize revive_in keep_codes add_codes beam_encode Perturbed robust_schedule Masked
        CodeEntropy indices_to_signs signs_to_indices FSQ DiVeQ RandomProjectionQuantizer
        IBQ GumbelVQ SimCodebook CodeSampling orthogonality passthrough pack unpack
    """,
    "xq.models": """
        Tokenizer Reconstruction CNNEncoder CNNDecoder LinearEncoder LinearDecoder
        export_encoder export_decoder to_onnx
        VAR AR ar_b ar_l ar_xl ar_xxl RAR rar_b rar_l growing_guidance random_share
        teacher_forcing next_scale_input NextScale MAGVIT2Encoder MAGVIT2Decoder
        PatchEncoder PatchDecoder TiTokEncoder TiTokDecoder MaskGITDecoder
        ViTEncoder ViTDecoder freeze_ add_lora_ merge_lora_ save_lora load_lora_ lora_state_dict
        check_optimizer
    """,
    "xq.models.presets": """
        vqgan vqgan_gumbel rqgan var_vqvae llamagen_vq8 llamagen_vq16 magvit2_lfq ibq
        vit_vqgan bsq_vit titok
        vq vp2 msvr10p2 msbr10p2 robusttok xqgan_sc xqgan_v tiny Row
    """,
    "xq.models.checkpoints": """
        load_checkpoint inspect_checkpoint Found formats Format KeyTable Rename Drop Split
    """,
    "xq.losses": """
        DiscriminatorLoss GeneratorLoss LeCam R1 discriminator_loss generator_loss lecam r1
        adaptive_weight ramp
        PatchGAN StyleGANDiscriminator DINODiscriminator DiffAug fading_blur
        LPIPS lpips L1 L2 l1 l2 Composite CompositeLoss composite
        CodebookLoss codebook_loss EntropyLoss entropy_loss code_entropy
        FeatureAlignment Teacher TimmTeacher CLIPTeacher Features
        ContrastiveLoss contrastive_loss CosineLoss cosine_loss cooling_temperature
    """,
    "xq.images": "to_images to_uint8 to_pil pad_to_multiple",
    "xq.metrics": """
        CodebookUsage Usage RunningUtilisation psnr ssim
        FrechetDistance FeatureMoments Gaussian frechet_distance
    """,
    "xq.config": "describe build",
    "xq.pretrained": "Pretrained",
    "xq.token_store": "TokenStore",
    "xq.testing": "check_quantizer",
}


def exported(module: str) -> list[str]:
    """The names that a package re-exports, or that a plain module defines."""
    path = inspect.getfile(importlib.import_module(module))
    body = ast.parse(Path(path).read_text()).body
    if path.endswith("__init__.py"):
        imports = (node for node in body if isinstance(node, ast.ImportFrom))
        return [alias.asname or "" for node in imports for alias in node.names]
    kinds = ast.FunctionDef | ast.ClassDef
    names = [node.name for node in body if isinstance(node, kinds)]
    return [name for name in names if not name.startswith("_")]


PUBLIC = [(module, name) for module in PROMISED for name in exported(module)]


@pytest.mark.parametrize("module", PROMISED)
def test_promised_names_are_exported(module):
    assert set(PROMISED[module].split()) <= set(exported(module))


@pytest.mark.parametrize("module", ["xq", "xq.quantizers", "xq.models"])
def test_packages_only_re_export(module):
    path = Path(inspect.getfile(importlib.import_module(module)))
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Expr) or ast.unparse(node).startswith("__version__"):
            continue
        assert isinstance(node, ast.ImportFrom), ast.unparse(node)
        assert all(alias.asname == alias.name for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[".".join(pair) for pair in PUBLIC])
def test_a_public_name_has_a_docstring_of_its_own(module, name):
    found = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(found) or callable(found)):
        return
    doc = found.__dict__.get("__doc__") if inspect.isclass(found) else found.__doc__
    assert doc
    assert not doc.startswith(f"{name}("), "this is the one that NamedTuple makes up"
    assert doc.split("\n")[0].strip()


def test_type_hints_ship():
    assert (files("xq") / "py.typed").is_file()


def test_version():
    assert xq.__version__.split(".")[:2] == ["0", "1"]


def loaded_by(imports: str) -> set[str]:
    """The top-level modules in `sys.modules` of a new interpreter."""
    code = f"import {imports}\nimport sys\nsys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert not done.stderr
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "imports", ["xq", "xq.quantizers, xq.models, xq.losses, xq.metrics, xq.config, xq.testing"]
)
def test_imports_pull_in_nothing_optional(imports):
    loaded = loaded_by(imports)
    extra = loaded & OPTIONAL
    # torch itself may bring triton
    assert not extra or not extra - loaded_by("torch")
    assert not loaded & {"pytest", "hypothesis", "beartype"}


def test_the_notation_of_the_paper():
    quantizer = ProductQuantizer(ResidualQuantizer(BSQ(12), depth=10, multiscale=True), P=2)
    assert (quantizer.dim, quantizer.codebook_size, quantizer.code_shape) == (24, 4096, (2,))
    assert quantizer.scales == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    z, indices, losses = quantizer(torch.randn(2, 16, 16, 24))
    assert z.shape == (2, 16, 16, 24)
    assert indices.shape == (2, 680, 2)
    losses.total().backward()
    assert torch.equal(quantizer.decode(indices), z)
