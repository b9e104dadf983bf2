#!/usr/bin/env python3
"""The corruptions of data.py against the operations of CIFAR-100-C, written again in plain loops and other libraries.

    python .ci/corruptions.py
"""

import colorsys
import functools
import itertools
import math
import sys
from pathlib import Path

import numpy as np
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from test_smoke import run as run_tests  # noqa: E402


def plain_blur(x, sigma, cut, edge):
    """A Gaussian blur of the first two axes, a line at a time."""
    radius = int(cut * sigma + 0.5)
    kernel = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-radius, radius + 1)]
    for axis in (0, 1):
        x = np.apply_along_axis(lambda line: np.convolve(np.pad(line, radius, mode=edge), kernel, "valid"), axis, x)
    return x / sum(kernel) ** 2


def plain_defocus(x, rng, radius, sigma):
    """A disk, blurred by a Gaussian, moves over the image."""
    squares = np.arange(-1, 2) ** 2
    disk = plain_blur(1.0 * (squares[:, None] + squares <= radius**2), sigma, 1 / sigma, "constant")
    x = np.pad(x, [(1, 1), (1, 1), (0, 0)], mode="reflect")
    total = sum(disk[i, j] * x[i : i + 32, j : j + 32] for i, j in np.ndindex(3, 3))
    return total / disk.sum() + 1e-9  # even areas stay, also truncated


def plain_glass(x, rng, sigma, times):
    x = (plain_blur(x, sigma, 4, "edge") * 255).astype(np.uint8)
    for _ in range(times):
        up, left = rng.integers(0, 2, (2, 30, 30))
        for h, w in itertools.product(range(31, 1, -1), repeat=2):
            a, b = h - up[h - 2, w - 2], w - left[h - 2, w - 2]
            x[h, w], x[a, b] = x[a, b], x[h, w]  # copies, because x[h, w] on the right is a view
    return plain_blur(x / 255, sigma, 4, "edge")


def plain_zoom(x, rng, end):
    images = [x]
    for factor in np.arange(1, end, 0.01):
        cut = math.ceil(32 / factor)
        size = round(cut * factor)
        places = (32 - cut) // 2 + np.linspace(0, cut - 1, size)[(size - 32) // 2 :][:32]
        read = functools.partial(np.interp, places, np.arange(32))
        images.append(np.apply_along_axis(read, 1, np.apply_along_axis(read, 0, x)))
    return np.mean(images, axis=0)


def plain_fog(x, rng, thickness, decay):
    z, step, wobble = np.zeros((32, 32)), 32, 100
    while step > 1:
        h, draws = step // 2, rng.uniform(-(wobble**2), wobble**2, (3, 32 // step, 32 // step))
        diagonal, straight = ((h, h), (h, -h), (-h, h), (-h, -h)), ((h, 0), (-h, 0), (0, h), (0, -h))
        for draw, down, right, around in zip(draws, (h, 0, h), (h, h, 0), (diagonal, straight, straight)):
            for i, j in np.ndindex(draw.shape):
                r, c = i * step + down, j * step + right
                z[r, c] = sum(z[(r + a) % 32, (c + b) % 32] for a, b in around) / 4 + draw[i, j]
        step, wobble = h, wobble / decay
    z = (z - z.min()) / (z.max() - z.min())
    return (x + thickness * z[:, :, None]) * x.max() / (x.max() + thickness)


def plain_elastic(x, rng, alpha, sigma, affine):
    def read(x, rows, columns, mode):
        """Bilinear; beyond the edge the image goes on mirrored."""
        x, r, c = np.pad(x, [(9, 9), (9, 9), (0, 0)], mode=mode), rows.astype(int), columns.astype(int)
        down, right = (rows - r)[..., None], (columns - c)[..., None]
        upper, lower = ((1 - right) * x[r + k, c] + right * x[r + k, c + 1] for k in (0, 1))
        return (1 - down) * upper + down * lower

    points, (rows, columns) = np.array([[26, 26], [26, 6], [6, 6]]), np.mgrid[:32, :32]  # column, row
    moved = points + rng.uniform(-32 * affine, 32 * affine, (3, 2))
    matrix = points.T @ np.linalg.inv(np.vstack([moved.T, np.ones(3)]))  # (2, 3), of column vectors
    x = read(x, *np.tensordot(matrix, [columns, rows, 0 * rows + 1], 1)[::-1] + 9, "reflect")
    if alpha == 0:
        return x
    moves = 32 * alpha * plain_blur(rng.uniform(-1, 1, (32, 32, 2)), 32 * sigma, 3, "symmetric") + 9
    return read(x, rows + moves[..., 1], columns + moves[..., 0], "symmetric")


def plain_brightness(x, rng, more):
    pixels = [colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3)]
    return np.reshape([colorsys.hsv_to_rgb(h, s, min(v + more, 1)) for h, s, v in pixels], x.shape)


def test_corrupt_equals_the_plain_operations():
    """At each of the five published strengths, but for rounding before the truncation."""
    image = data.load_synthetic(train=False)[0][:1]
    x, pixels = image[0].numpy() / 255, image[0].permute(2, 0, 1).contiguous()  # (32, 32, 3) and (3, 32, 32)
    resize = functools.partial(TF.resize, interpolation=TF.InterpolationMode.BOX)
    table = {
        "gaussian_noise": (lambda x, rng, sigma: x + rng.normal(0, sigma, x.shape), 0.04, 0.06, 0.08, 0.09, 0.1),
        "shot_noise": (lambda x, rng, photons: rng.poisson(photons * x) / photons, 500, 250, 100, 75, 50),
        "impulse_noise": (lambda x, rng, share: np.where(rng.random(x.shape) < share, rng.random(x.shape) < 0.5, x),
                          0.01, 0.02, 0.03, 0.05, 0.07),
        "defocus_blur": (plain_defocus, (0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "glass_blur": (plain_glass, (0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)),
        "zoom_blur": (plain_zoom, 1.06, 1.11, 1.16, 1.21, 1.26),
        "fog": (plain_fog, (0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "brightness": (plain_brightness, 0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (lambda x, rng, share: (1 - share) * x.mean((0, 1)) + share * x, 0.75, 0.5, 0.4, 0.3, 0.15),
        "elastic_transform": (plain_elastic, (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05),
                              (0.1, 0.03, 0.03)),
        "pixelate": (lambda x, rng, size: np.array(resize(resize(TF.to_pil_image(pixels), [size] * 2), [32] * 2)) / 255,
                     30, 28, 27, 24, 20),
        "jpeg_compression": (lambda x, rng, quality: decode_jpeg(encode_jpeg(pixels, quality)).permute(1, 2, 0) / 255,
                             80, 65, 58, 50, 40),
    }  # fmt: skip
    assert tuple(table) == data.CORRUPTIONS
    for (place, (name, (plain, *strengths))), severity in itertools.product(enumerate(table.items()), range(1, 6)):
        strength, rng = strengths[severity - 1], np.random.default_rng([0, place, severity, 0])
        expected = np.asarray(plain(x, rng, *strength) if isinstance(strength, tuple) else plain(x, rng, strength))
        found = data.corrupt(image, name, severity)[0].numpy().astype(int)
        apart = np.abs(found - (np.clip(expected, 0, 1) * 255).astype(int))
        assert apart.max() <= 1 and (apart > 0).mean() < 0.005, (name, severity, apart.max(), (apart > 0).mean())


if __name__ == "__main__":
    sys.exit("failed" in run_tests([test_corrupt_equals_the_plain_operations]))
