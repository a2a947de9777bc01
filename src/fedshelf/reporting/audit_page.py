"""A privacy audit as one HTML page that needs no network. It shows photos of the store: it must not leave the store."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape

from torch import Tensor

from fedshelf.core.text import counted
from fedshelf.privacy.audit.findings import ASSUMPTIONS, UNPROTECTED, AuditReport, CanaryFinding, Reconstruction
from fedshelf.reporting.formatting import ABSENT, number, percent

MODELS = {"run": "the run's own", "probe": "probe"}
_CANARIES = ("model", "protection", "right guesses", "ε found", "ceiling", "ε of the round by the accountant")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { text-align: left; padding: .3rem .8rem .3rem 0; }
th { border-bottom: 1px solid #999; } td { border-bottom: 1px solid #ddd; vertical-align: top; }
td.figure, th.figure { text-align: right; font-variant-numeric: tabular-nums; }
img { width: 96px; height: 96px; image-rendering: pixelated; margin-right: 4px; }
.warning { border-left: 4px solid #b00; padding-left: 1rem; } .note { color: #555; }
"""


def audit_page(report: AuditReport) -> str:
    """The page as text. All names in it are escaped, and it may load nothing.

    Args:
        report: what was found.
    """
    parts = [
        f"<h1>Privacy audit of {escape(report.store)}</h1>",
        '<p class="warning">This page shows photos of the store. It was made at the store and stays there.</p>',
        f"<p>Run {escape(report.run_id)}: {escape(report.model)}; {escape(report.settings)}.</p>",
        *_inversions(report), *_labels(report), *_canaries(report), *_membership(report), *_rare_products(report),
        "<h2>Unprotected</h2>", "<p>No protection of an update covers this:</p>", _list(UNPROTECTED),
        "<h2>Not attacked</h2>", _list(report.left_out or ("Nothing was left out.",)),
    ]  # fmt: skip
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>Privacy audit of {escape(report.store)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def rows_of_inversions(report: AuditReport) -> list[tuple[str, ...]]:
    """By inversion: model, protection, SSIM, PSNR, seconds."""
    return [
        (MODELS[one.model], one.protection, number(one.ssim), f"{one.psnr:.1f} dB", f"{one.seconds:.1f}")
        for one in report.reconstructions
    ]


def rows_of_labels(report: AuditReport) -> list[tuple[str, ...]]:
    """By label inference: model, protection, photos, right, by chance, error of features."""
    return [
        (
            MODELS[one.model], one.protection, f"{one.num_photos}", percent(one.num_right / one.num_photos),
            percent(one.chance), ABSENT if one.features_error is None else f"{one.features_error:.2g}",
        )
        for one in report.labels
    ]  # fmt: skip


def rows_of_canaries(findings: Sequence[CanaryFinding]) -> list[tuple[str, ...]]:
    """By audit with canaries: model, protection, right guesses and their interval, ε found, ceiling, ε accounted."""
    rows: list[tuple[str, ...]] = []
    for one in findings:
        found = one.found
        low, high = found.interval
        rows.append((
            MODELS[one.model], one.protection,
            f"{found.num_right_of_all} of {found.num_canaries} ({percent(low)} to {percent(high)})",
            f"≥ {found.epsilon:.2f}", f"{found.ceiling:.2f}",
            "none" if math.isinf(one.accounted) else f"≤ {one.accounted:.2f}",
        ))  # fmt: skip
    return rows


def rows_of_membership(report: AuditReport) -> list[tuple[str, ...]]:
    """By LiRA: protection, AUC, detections and their interval."""
    return [
        (
            one.protection, number(one.found.auc), percent(one.found.true_positive_rate),
            " to ".join(percent(end) for end in one.found.interval),
        )
        for one in report.membership
    ]  # fmt: skip


def _inversions(report: AuditReport) -> Iterable[str]:
    yield "<h2>Gradient inversion</h2>"
    yield "<p>Photos that were reconstructed from an update of one step.</p>"
    names = ("model", "protection", "SSIM", "PSNR", "seconds", "originals", "reconstructed")
    rows = [
        (*map(escape, row), _pictures(one.originals), _pictures(one.pictures))
        for row, one in zip(rows_of_inversions(report), report.reconstructions, strict=True)
    ]
    yield _table(names, rows)
    yield f'<p class="note">{_steps(report.reconstructions)} Another photo of this store reaches an SSIM of '
    yield f"{number(report.chance_ssim)} on average.</p>"
    yield _list(ASSUMPTIONS["gradient inversion"])


def _steps(found: Sequence[Reconstruction]) -> str:
    return f"Each attack took {counted(found[0].steps, 'iteration')}." if found else ""


def _labels(report: AuditReport) -> Iterable[str]:
    yield "<h2>Label inference</h2>"
    yield "<p>Products of the photos of one step, read off the gradient of the output layer.</p>"
    names = ("model", "protection", "photos", "labels right", "by chance", "error of features")
    yield _table(names, [tuple(map(escape, row)) for row in rows_of_labels(report)])
    yield _list(ASSUMPTIONS["label inference"])


def _canaries(report: AuditReport) -> Iterable[str]:
    yield "<h2>Membership: canaries</h2>"
    yield "<p>Photos with wrong labels, of which half were trained on: whether an upload tells which.</p>"
    yield _table(_CANARIES, [tuple(map(escape, row)) for row in rows_of_canaries(report.canaries)])
    if report.canaries:
        yield f'<p class="note">δ = {report.canaries[0].found.delta:g}.</p>'
    yield _list(ASSUMPTIONS["canaries"])
    if report.store_canaries:
        yield "<h2>Membership: canary stores</h2>"
        yield "<p>Whether the noisy mean of a round tells which stores took part.</p>"
        yield _table(_CANARIES, [tuple(map(escape, row)) for row in rows_of_canaries(report.store_canaries)])
        yield _list(ASSUMPTIONS["canary stores"])


def _membership(report: AuditReport) -> Iterable[str]:
    if not report.membership:
        return
    found = report.membership[0].found
    yield "<h2>Membership: LiRA</h2>"
    yield f"<p>Whether a photo was trained on, told by {counted(found.num_shadows, 'shadow head')}.</p>"
    names = ("protection", "AUC", f"found with {percent(found.false_positive_rate)} false alarms", "95 % interval")
    yield _table(names, [tuple(map(escape, row)) for row in rows_of_membership(report)])
    yield _list(ASSUMPTIONS["LiRA"])


def _rare_products(report: AuditReport) -> Iterable[str]:
    yield "<h2>Products of few stores</h2>"
    if report.rare_products is None:
        yield "<p>A store does not know what others sell. Headquarters can audit the run.</p>"
        return
    yield (
        f"<p>Products that fewer than {counted(report.least_stores, 'store')} sell. Their rows of the output layer are "
        "those stores' rows, even in a sum over all stores: secure aggregation does not hide them.</p>"
    )
    rows = [
        (escape(rare.product), escape(", ".join(rare.stores)), f"{len(rare.stores)}") for rare in report.rare_products
    ]
    yield _table(("product", "stores", "number"), rows) if rows else "<p>There are none.</p>"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _list(sentences: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "\n</ul>"


def _pictures(pictures_B3HW: Tensor) -> str:
    return "".join(f'<img alt="" src="data:image/png;base64,{_png(picture)}">' for picture in pictures_B3HW)


def _png(picture_3HW: Tensor) -> str:
    from PIL import Image  # slow to import, and only used here

    pixels = (picture_3HW.permute(1, 2, 0) * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
