"""List the published shapes: python -m raptide.model"""

from __future__ import annotations

import argparse

from raptide.model.config import ModelSettings
from raptide.model.families import count_parameters
from raptide.model.shapes import ALL_PRESETS, read_shape

GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m raptide.model",
        description="Model shapes: those that were published, and small LSTMs. In a recipe: "
        "`model: {preset: NAME}`, with any field of its own beside it; or no preset and all "
        "numbers (family, layers, width, heads, ...).",
    )
    parser.parse_args()
    print(f"{'preset':<16}{'layers':>7}{'width':>7}{'heads':>7}{'parameters':>16}", end="")
    print(f"{'fp32 GB':>10}{'bf16 GB':>10}")
    for name in ALL_PRESETS:
        settings = read_shape({"preset": name})
        count = count_parameters(settings)
        heads = settings.heads if isinstance(settings, ModelSettings) else "-"
        print(f"{name:<16}{settings.layers:>7}{settings.width:>7}{heads:>7}", end="")
        print(f"{count:>16,}{4 * count / GB:>10.2f}{2 * count / GB:>10.2f}")
    print(
        "\nMemory is that of the weights alone. With gradients and Adam's moments, training takes "
        "16 bytes\na parameter; ZeRO 1 to 3 divide more and more of that among the workers."
    )


if __name__ == "__main__":
    main()
