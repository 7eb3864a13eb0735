"""The image processors of TCL: pixels for inference, as the original makes them."""

from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling


class _Pixels:
    """Images are resized to a square, bicubically, and normalised with CLIP's mean and std."""

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 256, "width": 256}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


class TCLImageProcessor(_Pixels, TorchvisionBackend):
    """Resize to a square, bicubically, and normalise with CLIP's mean and std, on tensors (any device).

    The pixels of a photo differ from those of [`TCLImageProcessorPil`] by one grey level at most (0.015 when
    normalised); those of noise that is resized in one direction only, by up to four.
    """


class TCLImageProcessorPil(_Pixels, PilBackend):
    """Resize to a square, bicubically, and normalise with CLIP's mean and std, by PIL: bit for bit as the original."""


__all__ = ["TCLImageProcessor", "TCLImageProcessorPil"]
