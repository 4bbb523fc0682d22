"""The kinds of tasks, a module each; `task.py` says what one is.

A kind is its settings, as they stand in a benchmark file, and the class that is made of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raptide.evaluation.tasks.contacts import Contacts, ContactsSettings
from raptide.evaluation.tasks.homology import Homology, HomologySettings
from raptide.evaluation.tasks.perplexity import PerplexitySettings, PerplexityTask
from raptide.evaluation.tasks.secondary_structure import (
    SecondaryStructure,
    SecondaryStructureSettings,
)
from raptide.evaluation.tasks.space import Space, SpaceSettings
from raptide.evaluation.tasks.task import Task, TaskSettings
from raptide.evaluation.tasks.variants import Variants, VariantsSettings
from raptide.evaluation.tasks.variants_supervised import (
    VariantsSupervised,
    VariantsSupervisedSettings,
)

KINDS: dict[str, tuple[type[TaskSettings], type]] = {
    "perplexity": (PerplexitySettings, PerplexityTask),
    "secondary-structure": (SecondaryStructureSettings, SecondaryStructure),
    "contacts": (ContactsSettings, Contacts),
    "homology": (HomologySettings, Homology),
    "variants": (VariantsSettings, Variants),
    "variants-supervised": (VariantsSupervisedSettings, VariantsSupervised),
    "space": (SpaceSettings, Space),
}


def make_task(settings: Any, scratch: Path) -> Task:
    """A task with its data, checked.

    Args:
        scratch: where what is made of data alone is kept, by the data's digests.

    Raises:
        InputError: a file is missing, or does not hold what the task needs.
    """
    if isinstance(settings, PerplexitySettings):
        return PerplexityTask(settings, scratch)
    return KINDS[settings.kind][1](settings)
