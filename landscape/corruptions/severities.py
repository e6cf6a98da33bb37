"""The strengths of the 15 corruptions at severities 1 to 5, for ImageNet-C and for CIFAR-C.

Facts taken from the code of Hendrycks & Dietterich (2019), arXiv 1903.12261, published at
github.com/hendrycks/robustness under the Apache licence 2.0: `imagenet_c/corruptions.py` and
`create_c/make_cifar_c.py`. The ImageNet elastic transform is that of `imagecorruptions` (Michaelis
et al., 2019, arXiv 1907.07484), which replaced the original's. Lengths are in pixels unless said.
"""

from typing import Any, Literal, get_args

Profile = Literal["imagenet", "cifar"]
PROFILES: tuple[str, ...] = get_args(Profile)

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The 15 corruptions in the order of ImageNet-C: noise, blur, weather, digital."""

SEVERITIES = (1, 2, 3, 4, 5)

Level = tuple[Any, ...]

# Arguments of the kernel of each corruption, one row per severity.
# fmt: off
IMAGENET: dict[str, tuple[Level, ...]] = {
    # standard deviation, in units of full scale
    "gaussian_noise": ((.08,), (.12,), (.18,), (.26,), (.38,)),
    # photons at full scale
    "shot_noise": ((60,), (25,), (12,), (5,), (3,)),
    # share of the values replaced
    "impulse_noise": ((.03,), (.06,), (.09,), (.17,), (.27,)),
    # radius of the disk, standard deviation of its antialiasing
    "defocus_blur": ((3, .1), (4, .5), (6, .5), (8, .5), (10, .5)),
    # standard deviation of the blur, largest displacement, iterations
    "glass_blur": ((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    # radius, standard deviation along the motion
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    # zoom factors 1, 1 + step, …: step, their number
    "zoom_blur": ((.01, 12), (.01, 16), (.02, 11), (.02, 13), (.03, 11)),
    # mean, standard deviation, zoom, threshold, radius and deviation of the motion, share of image
    "snow": (
        (.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
        (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55),
    ),
    # factor of the image, factor of the frost
    "frost": ((1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75)),
    # strength, decay of the roughness from scale to scale
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    # added to the value of HSV, in units of full scale
    "brightness": ((.1,), (.2,), (.3,), (.4,), (.5,)),
    # factor of the deviations from the mean
    "contrast": ((.4,), (.3,), (.2,), (.1,), (.05,)),
    # displacements before smoothing, in heights
    "elastic_transform": ((.0625,), (.08125,), (.10625,), (.125,), (.15,)),
    # factor of the size
    "pixelate": ((.6,), (.5,), (.4,), (.3,), (.25,)),
    # quality
    "jpeg_compression": ((25,), (18,), (15,), (10,), (7,)),
}

CIFAR: dict[str, tuple[Level, ...]] = {
    "gaussian_noise": ((.04,), (.06,), (.08,), (.09,), (.10,)),
    "shot_noise": ((500,), (250,), (100,), (75,), (50,)),
    "impulse_noise": ((.01,), (.02,), (.03,), (.05,), (.07,)),
    "defocus_blur": ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)),
    "glass_blur": ((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((.01, 7), (.01, 12), (.01, 16), (.01, 21), (.01, 26)),
    "snow": (
        (.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
        (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8),
    ),
    "frost": ((1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45)),
    "fog": ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": ((.05,), (.1,), (.15,), (.2,), (.3,)),
    "contrast": ((.75,), (.5,), (.4,), (.3,), (.15,)),
    # displacements before smoothing, deviation of the smoothing, shift of the corners, in heights
    "elastic_transform": (
        (0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05), (.1, .03, .03),
    ),
    "pixelate": ((.95,), (.9,), (.85,), (.75,), (.65,)),
    "jpeg_compression": ((80,), (65,), (58,), (50,), (40,)),
}
# fmt: on
