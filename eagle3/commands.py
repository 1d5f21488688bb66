"""Step 35: what the commands around training are asked for; as light as the settings of a run, for the help."""

from dataclasses import dataclass
from typing import Literal

from eagle3.config import RunConfig
from eagle3.errors import ConfigError

DeviceName = Literal["h200", "h100", "a100"]
Format = Literal["plain", "speculators"]


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demonstration.

    Args:
        out: Folder for the target, the conversations, the run and the exports; must not exist yet.
        seed: Of everything random.
    """

    out: str = "eagle3-demo"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(RunConfig):
    """A run, and how it would be started.

    Args:
        processes: How many processes train together, one per device.
        device: Kind of the devices: NVIDIA H200, H100 SXM or A100 SXM.
        json: Print JSON in place of a table.
    """

    processes: int = 1
    device: DeviceName = "h200"
    json: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processes < 1:
            raise ConfigError(f"processes is {self.processes}, but must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to measure.

    Args:
        run: Folder of the run.
        checkpoint: `LATEST`, `BEST`, a checkpoint's name, or a path.
        target: Folder of the target, if it lies elsewhere than when the run was started.
        data: Conversations whose first questions are the prompts; null for the run's validation data, or without such
            its training data.
        num_prompts: Prompts to answer, the first of the file.
        max_new_tokens: Where an answer is cut.
        num_drafted: Tokens that the draft proposes for each pass of the target; null for the run's unroll.steps.
        temperature: Of the sampled answers, above 0.
        seed: Of the sampled answers.
    """

    run: str
    checkpoint: str = "LATEST"
    target: str | None = None
    data: str | None = None
    num_prompts: int = 32
    max_new_tokens: int = 128
    num_drafted: int | None = None
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_new_tokens", "num_drafted", "temperature"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}, but must be above 0.")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export.

    Args:
        run: Folder of the run.
        out: Folder to make; it must not exist.
        format: `plain` for vLLM and SGLang, `speculators` for vLLM and the library of that name.
        checkpoint: `LATEST` for the end of a finished run; or `BEST`, a checkpoint's name or a path, of any run.
        target: Folder of the target, if it lies elsewhere than when the run was started.
    """

    run: str
    out: str
    format: Format = "plain"
    checkpoint: str = "LATEST"
    target: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What to draw.

    Args:
        runs: Folders of runs, to be compared.
        out: Folder for `report.png` and `report.html`; null for that of the first run.
    """

    runs: list[str]
    out: str | None = None

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("runs is empty, but a report needs at least one run's folder.")
