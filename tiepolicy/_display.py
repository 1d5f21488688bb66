"""Step 11, showing: a plan as a table for people, and as a small SVG picture that is also readable as text."""

import html
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tiepolicy._external import ExternalTie
from tiepolicy._facts import TensorSpec
from tiepolicy._groups import Alias, Companion, RefusedClaim, TieGroup

#: Characters below which a column is not made narrower.
_MIN_COLUMN = 8


def render(
    tensors: Mapping[str, TensorSpec],
    groups: Sequence[TieGroup],
    refused: Sequence[RefusedClaim],
    external: Sequence[ExternalTie] = (),
    companions: Sequence[Companion] = (),
    *,
    title: str,
) -> str:
    """The groups with what each saves, what other models own, companions, and every refused claim as a sentence."""
    parts = [title]
    if groups:
        rows: list[tuple[str, ...]] = [("stored", "also named", "shape", "dtype", "saved", "because")]
        rows += [row for group in groups for row in _rows(group, tensors)]
        parts.append(columns(rows))
    if external:
        rows = [("belongs to", "name here", "shape", "dtype", "digest")]
        parts.append(columns(rows + [_external_row(tie, tensors) for tie in external]))
    if companions:
        parts.append("\n".join(["companions", *(f"  {companion}" for companion in companions)]))
    if refused:
        parts.append("\n".join(["refused", *(f"  {refusal}" for refusal in refused)]))
    return "\n\n".join(parts)


def summary(num_groups: int, num_left_out: int, num_refused: int, *, bytes_saved: int) -> str:
    """What a plan comes to, and what saves the bytes: `1 tied group (48 B saved), 0 claims refused`."""
    left_out = f" and {count(num_left_out, 'tensor')} of other models left out" if num_left_out else ""
    saved = f"{count(num_groups, 'tied group')}{left_out} ({format_bytes(bytes_saved)} saved)"
    return f"{saved}, {count(num_refused, 'claim')} refused"


def format_bytes(count: int) -> str:
    """A `count` of bytes with three significant digits in decimal units: `525 MB`."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _rows(group: TieGroup, tensors: Mapping[str, TensorSpec]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for alias in group.aliases:
        spec = tensors[alias.name]
        stored = "" if rows else group.canonical
        rows.append(
            (stored, alias.name, str(spec.shape), spec.dtype_name, format_bytes(spec.nbytes), alias.reason.value)
        )
    return rows


def _external_row(tie: ExternalTie, tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    spec = tensors[tie.name]
    return tie.source, tie.name, str(spec.shape), spec.dtype_name, tie.digest[:12] if tie.digest else "none, so stored"


def columns(rows: Sequence[tuple[str, ...]], *, width: int | None = None) -> str:
    """Lines of aligned cells; to fit a width, cells of the widest columns go on in further lines, set in."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > _MIN_COLUMN:
        widths[widths.index(max(widths))] -= 1
    return "\n".join(
        "  ".join(part.ljust(size) for part, size in zip(line, widths, strict=True)).rstrip()
        for row in rows
        for line in itertools.zip_longest(*map(_folded, row, widths), fillvalue="")
    )


def _folded(cell: str, width: int) -> list[str]:
    """A cell in lines, broken behind dots and spaces as far as there are any."""
    lines = []
    while len(cell) > width:
        end = max(cell.rfind(mark, 3, width) for mark in ". ") + 1 or width
        lines.append(cell[:end].rstrip())
        cell = f"  {cell[end:].lstrip()}"
    return [*lines, cell]


def printable(text: str) -> str:
    """A text in ASCII without control characters: names come from files, and go to terminals and pictures."""
    escaped = text.encode("ascii", "backslashreplace").decode()
    return "".join(character if " " <= character <= "~" else f"\\x{ord(character):02x}" for character in escaped)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# In pixels. Names are set in a font whose characters are all as wide.
_WIDTH, _MARGIN, _BOX_WIDTH, _BOX_HEIGHT = 800, 24, 330, 44
_GAP, _LINE = 12, 18
_NAME_CHARACTERS, _SENTENCE_CHARACTERS = 39, 112
#: Most links of one kind that are drawn; a picture of more is no longer looked at.
_MOST = 20


class LinkKind(StrEnum):
    """What connects the two sides of a link."""

    TIED = "tied"
    EXTERNAL = "external"
    REFUSED = "refused"


_HEADINGS = {
    LinkKind.TIED: "One tensor: stored once, under the name on the left",
    LinkKind.EXTERNAL: "Belongs to another model",
    LinkKind.REFUSED: "Claimed to be one tensor, and refused",
}

# Fonts and colours of its own, in light and in dark: the page around it may have either.
_STYLE = """
text { font: 13px system-ui, 'DejaVu Sans', sans-serif; fill: #1f2328; }
.name { font: 600 13px ui-monospace, 'DejaVu Sans Mono', monospace; } .head { font-weight: 600; font-size: 15px; }
.note { fill: #59636e; font-size: 12px; } .page { fill: #fff; stroke: #d0d7de; }
rect { stroke-width: 1.2; } path { fill: none; stroke: #59636e; stroke-width: 1.4; }
.stored { fill: #ddf4ff; stroke: #0969da; } .alias { fill: #f6f8fa; stroke: #8c959f; }
rect.external { fill: #fff8c5; stroke: #9a6700; } .refused { fill: #fff; stroke: #cf222e; stroke-dasharray: 5 3; }
path.refused { fill: none; stroke: #cf222e; } path.cross { stroke: #cf222e; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .note { fill: #9198a1; } .page { fill: #0d1117; stroke: #3d444d; } path { stroke: #9198a1; }
.stored { fill: #12304f; stroke: #4493f8; } .alias { fill: #212830; stroke: #656c76; }
rect.external { fill: #3b2e0a; stroke: #d29922; } .refused { fill: #0d1117; stroke: #f85149; }
path.refused, path.cross { stroke: #f85149; }
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A name, and the names that are, or are not, the same tensor."""

    kind: LinkKind
    #: Name, and what stands below it.
    left: tuple[str, str]
    right: Sequence[tuple[str, str]]
    #: Why, in full.
    sentence: str = ""


def draw(summary: str, links: Sequence[Link], notes: Sequence[str] = ()) -> str:
    """Draw names that are one tensor, that belong to other models, and that are not one tensor although it was claimed.

    Args:
        summary: The heading.
        links: What to draw, in this order within each kind.
        notes: Sentences for the end.

    Returns:
        An SVG document, with the heading as its title and a sentence for each link as its description. All names are
        escaped; it holds no scripts and no links.
    """
    canvas = _Canvas()
    canvas.line(summary, "head")
    for kind in LinkKind:
        shown = [link for link in links if link.kind is kind]
        if shown:
            canvas.skip()
            canvas.line(f"{_HEADINGS[kind]}:", "note")
        for link in shown[:_MOST]:
            canvas.link(link)
        if len(shown) > _MOST:
            canvas.line(f"and {len(shown) - _MOST} more", "note")
    if notes:
        canvas.skip()
    for note in notes:
        canvas.sentence(note)
    return canvas.document(summary, [*map(_described, links), *notes])


def links_of(
    tensors: Mapping[str, TensorSpec],
    groups: Sequence[TieGroup],
    refused: Sequence[RefusedClaim],
    external: Sequence[ExternalTie],
) -> list[Link]:
    """The links of a plan."""
    links = [
        Link(
            kind=LinkKind.TIED,
            left=(group.canonical, what(tensors[group.canonical])),
            right=[(alias.name, _because(alias)) for alias in group.aliases],
        )
        for group in groups
    ]
    links += [
        Link(kind=LinkKind.EXTERNAL, left=(tie.source, _digest(tie)), right=[(tie.name, what(tensors[tie.name]))])
        for tie in external
    ]
    return [*links, *map(refusal_link, refused)]


def refusal_link(refusal: RefusedClaim, prefix: str = "") -> Link:
    """A refused claim, with the two names and their shapes.

    Args:
        refusal: The claim.
        prefix: What stands before its names in a checkpoint.
    """
    left, right = (
        (prefix + name, "absent" if shape is None else str(shape))
        for name, shape in zip(refusal.claim.names, refusal.shapes, strict=True)
    )
    return Link(kind=LinkKind.REFUSED, left=left, right=[right], sentence=str(refusal))


def what(spec: TensorSpec) -> str:
    """Shape, dtype and size in a few words."""
    return f"{spec.shape} {spec.dtype_name}, {format_bytes(spec.nbytes)}"


def _because(alias: Alias) -> str:
    return str(alias.reason) if alias.view is None else f"{alias.reason}: {alias.view.shape} from {alias.view.offset}"


def _digest(tie: ExternalTie) -> str:
    return f"SHA-256 {tie.digest[:12]}" if tie.digest else "no digest, so stored here too"


def _described(link: Link) -> str:
    """A link as a sentence."""
    names = " and ".join(name for name, _ in link.right)
    if link.kind is LinkKind.REFUSED:
        return link.sentence
    if link.kind is LinkKind.EXTERNAL:
        return f"{names} is {link.left[0]}, which belongs to another model"
    return f"{names} {'is' if len(link.right) == 1 else 'are'} {link.left[0]}, which is stored ({link.left[1]})"


class _Canvas:
    """Elements from top to bottom."""

    def __init__(self) -> None:
        self.elements: list[str] = []
        self.y = _MARGIN

    def skip(self) -> None:
        self.y += _GAP

    def line(self, text: str, style: str) -> None:
        self._text(_MARGIN, self.y + 13, text, style)
        self.y += _LINE + 6

    def sentence(self, text: str) -> None:
        for line in textwrap.wrap(printable(text), _SENTENCE_CHARACTERS, break_on_hyphens=False):
            self._text(_MARGIN, self.y + 12, line, "note")
            self.y += _LINE
        self.y += 4

    def link(self, link: Link) -> None:
        """The box on the left, those on the right below each other, and lines between them."""
        right = _WIDTH - _MARGIN - _BOX_WIDTH
        middle, start = self.y + _BOX_HEIGHT // 2, _MARGIN + _BOX_WIDTH
        styles = {LinkKind.TIED: ("stored", "alias"), LinkKind.EXTERNAL: ("external", "alias")}
        left_style, right_style = styles.get(link.kind, ("refused", "refused"))
        top = self.y
        for name, note in link.right:
            end = self.y + _BOX_HEIGHT // 2
            bend = (start + right) // 2
            self.elements.append(f'<path class="{link.kind}" d="M{start} {middle}H{bend}V{end}H{right}"/>')
            if link.kind is LinkKind.REFUSED:
                self.elements.append(f'<path class="cross" d="M{bend - 6} {end - 6}l12 12m0 -12l-12 12"/>')
            self._box(right, self.y, name, note, right_style)
            self.y += _BOX_HEIGHT + 8
        self._box(_MARGIN, top, *link.left, left_style)
        if link.sentence:
            self.sentence(link.sentence)

    def document(self, title: str, sentences: Sequence[str]) -> str:
        height = self.y + _MARGIN - 8
        description = ". ".join(printable(sentence) for sentence in sentences)
        size = f'width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title description">',
                f'<title id="title">{_escaped(title)}</title>',
                f'<desc id="description">{_escaped(description)}</desc>',
                f"<style>{_STYLE}</style>",
                f'<rect class="page" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="8"/>',
                *self.elements,
                "</svg>\n",
            ]
        )

    def _box(self, x: int, y: int, name: str, note: str, style: str) -> None:
        whole = f"<title>{_escaped(name)}</title>"
        self.elements.append(
            f'<g>{whole}<rect class="{style}" x="{x}" y="{y}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="5"/>'
        )
        self._text(x + 12, y + 19, _shorten(printable(name)), "name")
        self._text(x + 12, y + 36, note, "note")
        self.elements.append("</g>")

    def _text(self, x: int, y: int, text: str, style: str) -> None:
        self.elements.append(f'<text class="{style}" x="{x}" y="{y}">{_escaped(text)}</text>')


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _shorten(name: str) -> str:
    """The beginning and the end of a name; its end says more than its middle."""
    if len(name) <= _NAME_CHARACTERS:
        return name
    end = (_NAME_CHARACTERS - 2) // 2
    return f"{name[: _NAME_CHARACTERS - 3 - end]}...{name[-end:]}"
