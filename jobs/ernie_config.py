"""The configuration that all commands of the ERNIE job share, and what it refuses before any work."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jobs.cli import ClusterJob
from raysys.data.multimodal import Form, Multimodal, load_multimodal
from raysys.runtime.train import TrainConfig as Spread
from raysys.systems.ernie.artifact import Tokenizers
from raysys.systems.ernie.samples import samples_of
from raysys.systems.ernie.setting import FormSetting, ModelSetting, PretrainSetting
from raysys.systems.ernie.stream import Sample, Text, lay, window
from raysys.systems.ernie.tokenizers.audio import AudioCodec, AudioSetting
from raysys.systems.ernie.tokenizers.text import TextSetting, TextTokenizer
from raysys.systems.ernie.tokenizers.visual import VisualSetting, VisualTokenizer

WORDS = 16
"""Tokens that a caption and the marks around it are reckoned with."""


class ErnieConfig(ClusterJob):
    """Data, sizes and training of tokenizers and backbone."""

    data: str = "embedded"
    """embedded (digits, moving digits, tones, Python's documentation), a folder of text, images, video and audio, or
    embedded+FOLDER."""
    tokenizers: str = ""
    """Run folder whose tokenizers are used; by default they are trained."""
    form: FormSetting = FormSetting()
    """What all data is brought to."""
    text: TextSetting = TextSetting()
    """Text tokenizer."""
    visual: VisualSetting = VisualSetting()
    """Visual tokenizer."""
    audio: AudioSetting = AudioSetting()
    """Audio codec."""
    model: ModelSetting = ModelSetting()
    """The backbone."""
    pretrain: PretrainSetting = PretrainSetting()
    """Its training."""
    train: Spread = Spread(clip=1.0)
    """How training is spread over processes."""
    execution: Literal["actors", "inprocess"] = "actors"
    """actors: Ray Train workers, Ray Data and tasks; inprocess: the same numbers in this process."""
    items: int = Field(0, ge=0)
    """Training items of each task that are used at most; 0 means all."""
    seeds: int = Field(1, ge=1, le=10_000)
    """Repetitions."""

    @property
    def distributed(self) -> bool:
        return self.execution == "actors"

    def check(self) -> None:
        if self.pretrain.blocks % self.train.workers:
            raise ValueError(
                f"train.workers: got {self.train.workers}; it must divide pretrain.blocks, which is {self.pretrain.blocks}"
            )
        if self.audio.rate != self.form.rate:
            raise ValueError(
                f"audio.rate: got {self.audio.rate}; form.rate is {self.form.rate}, and they must be the same"
            )
        if self.form.samples % self.audio.hop:
            raise ValueError(
                f"form.samples: got {self.form.samples}; expected a multiple of audio.hop, {self.audio.hop}"
            )
        self.check_train(self.model)
        data = read(self)
        for task, count in self.pretrain.samples.model_dump().items():
            if count and task not in data.tasks:
                raise ValueError(f"pretrain.samples.{task}: got {count}; {self.data} has only {', '.join(data.tasks)}")
        self.check_shapes(data)

    def check_shapes(self, data: Multimodal) -> None:
        """Refuse sizes that do not fit each other or an item of the data.

        Raises:
            ValueError: one sentence.
        """
        form, levels = self.form, self.audio.levels
        if self.model.layers < levels:
            raise ValueError(
                f"model.layers: got {self.model.layers}; audio.levels is {levels}, and needs as many layers"
            )
        visual = VisualTokenizer(self.visual, form.channels, form.height, form.width)
        visual.latent_frames(form.frames)
        window(form.frames)
        codecs = Tokenizers(form, TextTokenizer([]), visual.eval(), AudioCodec(self.audio).eval(), "", "", ())
        for task, count in self.pretrain.samples.model_dump().items():
            if task == "lm" or not count:
                continue
            (sample,) = samples_of(codecs, data.train(task)[:1])
            bare = tuple(segment for segment in sample.segments if not isinstance(segment, Text))
            needed = len(lay(Sample(task, bare), visual.scales)) + WORDS
            if needed > self.pretrain.row:
                raise ValueError(
                    f"pretrain.row: got {self.pretrain.row}; a sample of {task} has {needed} tokens with a short caption"
                )

    def check_train(self, model: ModelSetting) -> None:
        """Refuse ways of training that this model or this execution cannot have.

        Raises:
            ValueError: one sentence.
        """
        if self.execution == "inprocess" and self.train.deepspeed != "off":
            raise ValueError(f"train.deepspeed: got {self.train.deepspeed} with execution inprocess; it needs actors")
        if model.experts % self.train.expert_parallel:
            size = self.train.expert_parallel
            raise ValueError(
                f"train.expert_parallel: got {size}; it must divide the {model.experts} experts of a layer"
            )

    def check_apart(self) -> None:
        """Refuse what a command cannot have that trains many models, each as a Ray task in a process of its own.

        Raises:
            ValueError: one sentence.
        """
        if self.execution != "actors":
            raise ValueError(f"execution: got {self.execution}; this command trains its models as Ray tasks")
        for name in ("workers", "gpus_per_worker", "expert_parallel", "deepspeed"):
            given, only = getattr(self.train, name), type(self.train).model_fields[name].default
            if given != only:
                raise ValueError(f"train.{name}: got {given}; each model of this command is trained in one process")


def read(config: ErnieConfig) -> Multimodal:
    """The data that the configuration names, in its form."""
    return load_multimodal(config.data, config.seed, Form(**config.form.model_dump()))
