"""Masked image modelling: what is hidden, what the loss sees, and that it is Transformers' loss."""

from collections.abc import Callable

import pytest
import torch
from transformers import ViTConfig, ViTForMaskedImageModeling

from fd_scale.config import ModelConfig, Recipe
from fd_scale.data import Batch
from fd_scale.errors import UserError
from fd_scale.models import normalize
from fd_scale.pretrain.masked import MaskedModule, MaskedTask

VIT = ModelConfig(
    name="fd_vit_tiny_patch16", img_size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4),
    overrides={"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
)  # fmt: skip


@pytest.fixture
def module() -> MaskedModule:
    torch.manual_seed(0)
    return MaskedModule(VIT, 32, torch.float32)


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture
def hidden() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.rand(3, 16) < 0.5


def batch_of(images: torch.Tensor, first: int = 0) -> Batch:
    return Batch(images, torch.zeros(len(images)), torch.arange(first, first + len(images)), 0)


def test_hidden_pixels_are_not_seen(module: MaskedModule, images: torch.Tensor, hidden: torch.Tensor) -> None:
    told = module(images, hidden)["told"]
    cells = hidden.view(3, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    others = torch.randint_like(images, 256)
    assert torch.equal(module(torch.where(cells, others, images), hidden)["told"], told)
    assert not torch.equal(module(torch.where(cells, images, others), hidden)["told"], told)
    with torch.no_grad():
        module.mask_cell += 1
    assert not torch.equal(module(images, hidden)["told"], told), "what stands there is learned"


def test_the_loss_is_that_of_transformers(
    module: MaskedModule, images: torch.Tensor, hidden: torch.Tensor
) -> None:
    """Its decoder, a 1 x 1 convolution and PixelShuffle, gets the weights of our head and our tokens."""
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
        patch_size=8, encoder_stride=8,
    )  # fmt: skip
    theirs = ViTForMaskedImageModeling(config)
    pixels = normalize(images, VIT.mean, VIT.std)
    cells = hidden.view(3, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    tokens = module.backbone(torch.where(cells, module.mask_cell.tile(1, 4, 4), pixels))
    theirs.vit.forward = lambda *_, **__: type("Output", (), {
        "last_hidden_state": tokens, "hidden_states": None, "attentions": None, "__getitem__": lambda *_: tokens,
    })()  # fmt: skip
    with torch.no_grad():
        theirs.decoder[0].weight.copy_(module.to_pixels.weight[..., None, None])
        theirs.decoder[0].bias.copy_(module.to_pixels.bias)
    expected = theirs(pixels, bool_masked_pos=hidden).loss
    found = module(images, hidden)["loss"] / (3 * 64 * hidden.sum())
    # Theirs divides by the number of hidden pixels plus 1e-5, of some 1,500.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_what_is_hidden_is_a_function_of_the_position(
    make_recipe: Callable[..., Recipe], images: torch.Tensor
) -> None:
    task = MaskedTask(make_recipe("masked"), None)
    assert (task.num_cells, task.num_hidden) == (9, 5), "0.6 of 3 x 3 cells of 8 px"
    images = images[:, :, :24, :24]
    hidden = task.inputs(batch_of(images, 7))["hidden_BL"]
    assert hidden.sum(1).tolist() == [5, 5, 5]
    assert torch.equal(task.inputs(batch_of(images[1:], 8))["hidden_BL"], hidden[1:])
    assert not torch.equal(task.inputs(batch_of(images, 10))["hidden_BL"], hidden)
    assert task.counts(batch_of(images)) == {"loss": 3 * 5 * 3 * 8 * 8}


def test_pictures(module: MaskedModule, images: torch.Tensor, hidden: torch.Tensor) -> None:
    told = normalize(images, VIT.mean, VIT.std).unfold(2, 8, 8).unfold(3, 8, 8)
    told = told.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    image, seen, whole = module.pictures(images, hidden, told).split(32, dim=2)
    assert torch.equal(image, images.permute(0, 2, 3, 1))
    assert (seen == 0).all(-1).sum() >= 64 * hidden.sum()
    assert torch.equal(whole, image), "a model that tells all pixels"


def test_a_size_that_is_no_number_of_cells_is_refused() -> None:
    """A stage of 100 px rounds up to 4 x 4 tokens, which cover 32 px each."""
    shape = {
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 1, 1],
        "window_size": 4,
    }
    with pytest.raises(UserError, match=r"100 px are not a whole number of cells of 32 px"):
        MaskedModule(ModelConfig(name="swin_v2_tiny", img_size=100, overrides=shape), 100, torch.float32)


@pytest.mark.parametrize("ratio", [0.05, 0.95])
def test_a_ratio_that_hides_nothing_or_all_is_refused(
    make_recipe: Callable[..., Recipe], ratio: float
) -> None:
    with pytest.raises(UserError, match=rf"masked\.ratio: {ratio} of 9 cells are"):
        MaskedTask(make_recipe("masked", masked={"ratio": ratio}), None)
