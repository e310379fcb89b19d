"""What a command prints and leaves behind: its table, and a run's folder with table and page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from safety_mech.reporting.html import Section, report_page, settings_section
from safety_mech.reporting.runs import write_run


def publish(
    experiment: str,
    config: Any,
    text: str,
    *,
    title: str,
    lead: str,
    sections: Sequence[Section],
    metrics: Mapping[str, Any],
    prompt_hashes: Mapping[str, str],
    tensors: Mapping[str, Tensor] | None = None,
    figures: Mapping[str, Figure] | None = None,
) -> Path:
    """Print a run's table, and write its folder with table.txt and report.html. Returns the folder.

    Args:
        config: a dataclass with the fields model and out.
        sections: of the page; its last one, the settings, is added here.
        metrics: of metrics.json; the prompt hashes are added here where it has none.
    """
    page = report_page(title, lead, [*sections, settings_section(config, prompt_hashes)])
    metrics = {"prompt_hashes": prompt_hashes, **metrics}
    print()
    return publish_table(experiment, config, text, page, metrics=metrics, tensors=tensors, figures=figures)


def publish_table(experiment: str, config: Any, text: str, page: str | None = None, **parts: Any) -> Path:
    """As `publish`, with a finished page or none; `parts`: metrics and what else `write_run` takes."""
    print(text)
    texts = {"table.txt": text + "\n"} | ({"report.html": page} if page else {})
    folder = write_run(config.out, experiment, config.model, config=config, texts=texts, **parts)
    print(f"written: {folder}/ ({', '.join(sorted(path.name for path in folder.iterdir()))})")
    return folder
