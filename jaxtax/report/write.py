"""`write_report`: from a study directory to report/ with index.html, report.md, summary.json and figures."""

from pathlib import Path

from jaxtax.artifact import ORIGIN, digest_files, read_origin, write_json, write_origin, write_text
from jaxtax.report.page import render
from jaxtax.report.study_files import read_study
from jaxtax.report.summary import summarize


def write_report(study_dir: Path, out: Path | None = None) -> Path:
    """Reports on a study as far as it is evaluated, and says what is missing.

    Args:
      study_dir: holds study.json and the evaluation directories that it names.
      out: where to write; `study_dir`/report unless given. An older report there is replaced.

    Returns:
      The report directory: index.html (one self-contained file), report.md, summary.json, the figures as SVG
      files and origin.json.

    Raises:
      ValueError: not a study, a damaged file, evaluations that cannot be compared, or an `out` that holds
        something else than a report; nothing is written then.
    """
    own = study_dir / "report"
    out = own if out is None else out
    _check_place(out, own)
    study = read_study(study_dir)
    summary = summarize(study)
    texts = render(study, summary)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "summary.json", summary)
    for name, text in texts.items():
        write_text(out / name, text)
    write_origin(out, "report", study=str(study_dir), missing=study.missing, digest=digest_files(out))
    return out


def _check_place(out: Path, own: Path) -> None:
    """Checks that a report may be written to `out`; in `own`, the place in the study, one may be half."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give another out=DIR")
    if (out / ORIGIN).exists():
        read_origin(out, "report")  # refuses to write over a study, a model or a run
    elif out.exists() and out.resolve() != own.resolve() and any(p.name[0] != "." for p in out.iterdir()):
        # A hidden file, on the other hand, is what a killed write left behind.
        raise ValueError(f"{out} is not empty and holds no report; give another out=DIR")
