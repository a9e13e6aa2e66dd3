"""Denoisers behind the seam of rlstitch.types.Backbone."""

from rlstitch.backbones.core import Diffusers as Diffusers
