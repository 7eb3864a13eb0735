"""Names of transformers that older versions lack. Everything here serves versions before 5.21."""

from transformers import PreTrainedConfig

try:
    from transformers.configuration_utils import SubConfigSpec
except ImportError:  # before 5.20
    SubConfigSpec = None


def specs_of(sub_configs: dict[str, type[PreTrainedConfig]]) -> dict:
    """Specifications of the configs inside a config, which 5.20 does not make from their classes itself."""
    return {name: SubConfigSpec(kind) for name, kind in sub_configs.items()} if SubConfigSpec else {}


def make_sub_configs(config: PreTrainedConfig) -> None:
    """Make the configs inside a config from dictionaries, which transformers before 5.20 leaves to each model."""
    for name, kind in config.sub_configs.items():
        value = getattr(config, name)
        if value is None or isinstance(value, dict):
            setattr(config, name, kind(**(value or {})))


__all__ = ["make_sub_configs", "specs_of"]
