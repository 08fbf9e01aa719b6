"""PCA-coloured feature maps: equal features have equal colours."""

import numpy as np
import torch

from fd_scale.distill.pictures import side_by_side


def test_equal_features_have_equal_colours_and_others_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 16, 24), generator=generator, dtype=torch.uint8)
    target = torch.randn(3, 2 * 3, 8, generator=generator)
    other = torch.randn(3, 2 * 3, 8, generator=generator)
    # Whitening removes a token's scale and offset, so these are the same features.
    same = side_by_side(images, target, 3 * target + 5, (2, 3))
    assert same.shape == (3, 16, 72, 3)
    assert same.dtype == np.uint8
    image, teacher, student = np.split(same, 3, axis=2)
    np.testing.assert_array_equal(image, images.permute(0, 2, 3, 1).numpy())
    assert np.abs(teacher.astype(int) - student.astype(int)).max() <= 1  # rounding of fp32 to 8 bits
    assert teacher.std() > 20, "colours spread over the range"
    different = np.split(side_by_side(images, target, other, (2, 3)), 3, axis=2)
    np.testing.assert_array_equal(different[1], teacher)
    assert np.abs(different[2].astype(int) - teacher.astype(int)).mean() > 20
    # Row-major tokens: the first token is the picture's top left corner.
    assert (teacher[:, :8, :8] == teacher[:, :1, :1]).all()


def test_fewer_components_than_colours() -> None:
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    picture = side_by_side(images, torch.randn(1, 1, 2), torch.randn(1, 1, 2), (1, 1))
    assert picture.shape == (1, 4, 12, 3)
