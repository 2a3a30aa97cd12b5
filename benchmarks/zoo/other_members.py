"""The members that are no text transformers, and the ones whose runs on GPUs were measured."""

from __future__ import annotations

from code_members import CODE
from diffusers_members import DIFFUSERS
from measured_members import MEASURED
from member import Member
from signal_members import AUDIO, MULTIMODAL, SERIES
from vision_members import VISION

MEMBERS: tuple[Member, ...] = (*VISION, *AUDIO, *MULTIMODAL, *SERIES, *DIFFUSERS, *CODE, *MEASURED)
