"""Hardware as data: profiles with a source for every figure, strict to read."""

from .catalog import Profile, describe_profiles, list_profiles, load_profile, match_gpu, parse_profile
from .device import DeviceModel, LinkModel

__all__ = [
    "DeviceModel",
    "LinkModel",
    "Profile",
    "describe_profiles",
    "list_profiles",
    "load_profile",
    "match_gpu",
    "parse_profile",
]
