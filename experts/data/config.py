"""The config of a data set. `configs/dataset/*.yaml` are instances of `DatasetConfig`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from experts.registry import PieceOf, Settings, piece

_PIECE = PieceOf("augmentation", package="experts.augmentation")

ChannelValues = tuple[float, float, float]
Strength = Annotated[float, Field(ge=0, le=1)]


class ColorJitter(Settings):
    """Factors drawn per image from [1 - strength, 1 + strength], applied in a random order per image."""

    brightness: Strength = 0.0
    """Strength, no unit; 0 is off."""
    contrast: Strength = 0.0
    """Strength, no unit; 0 is off."""
    saturation: Strength = 0.0
    """Strength, no unit; 0 is off."""


class Augment(Settings):
    """Training augmentation: by keys, in the order in which they are applied, or as a list of pieces. Every image has
    draws of its own."""

    model_config = ConfigDict(defer_build=True)

    random_resized_crop: tuple[float, float] | None = None
    """Least and greatest share of the image's area that is cropped and resized to image_size (aspect 3/4 to 4/3), e.g.
    [0.08, 1]; null is off. Streamed files are cropped from the whole picture, resident images from their frame."""
    crop_padding: Annotated[int, Field(ge=0)] = 0
    """Pixels of black on each side, from which image_size is cropped at random; 0 is off."""
    horizontal_flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of mirroring left and right."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Greatest angle in degrees, either way; nearest pixel, black corners; 0 is off."""
    color_jitter: ColorJitter | None = None
    """Null is off."""
    pieces: tuple[Annotated[Any, _PIECE], ...] | None = None
    """Pieces in their order, instead of the keys above; a list in the place of this mapping is the same."""
    name: str | None = None
    """The stack of configs/augment/ that the pieces are from."""

    @property
    def stack(self) -> tuple[Any, ...]:
        """Return the pieces that change images, as configs of kind "augmentation"."""
        if self.pieces is not None:
            return tuple(config for config in self.pieces if not config.is_off)
        found = [
            _config("crop", padding=self.crop_padding),
            _config("flip", probability=self.horizontal_flip),
            _config("rotation", degrees=self.rotation),
        ]
        if self.random_resized_crop is not None:
            found.insert(0, _config(_WHOLE_PICTURES, scale=self.random_resized_crop))
        if self.color_jitter is not None:
            found.append(_config("color_jitter", **self.color_jitter.model_dump()))
        return tuple(config for config in found if not config.is_off)

    @property
    def is_off(self) -> bool:
        """Whether every image looks the same each time it is drawn."""
        return not self.stack

    @property
    def crop_scale(self) -> tuple[float, float] | None:
        """The area shares of a random crop that comes first, which is made of whole pictures; None without one."""
        first = self.stack[0] if self.stack else None
        return first.scale if first is not None and first.name == _WHOLE_PICTURES else None

    @model_validator(mode="before")
    @classmethod
    def _list_of_pieces(cls, given: Any) -> Any:
        return {"pieces": given} if isinstance(given, list | tuple) else given

    @model_validator(mode="after")
    def _one_crop(self) -> Augment:
        if self.random_resized_crop is not None:
            low, high = self.random_resized_crop
            if not 0 < low <= high <= 1:
                raise ValueError(f"random_resized_crop = [{low:g}, {high:g}]: needs 0 < least <= greatest <= 1")
            if self.crop_padding:
                raise ValueError(
                    f"crop_padding = {self.crop_padding} and random_resized_crop are both set; set "
                    f"crop_padding=0 or random_resized_crop=null"
                )
        return self

    @model_validator(mode="after")
    def _keys_or_pieces(self) -> Augment:
        if self.pieces is None:
            if self.name is not None:
                raise ValueError(f"name = {self.name}: no pieces; needed pieces, which composing a config fills in")
            return self
        keys = [key for key, field in Augment.model_fields.items() if key not in ("pieces", "name")]
        both = [key for key in keys if getattr(self, key) != Augment.model_fields[key].default]
        if both:
            raise ValueError(f"{', '.join(both)}: set beside pieces; needed either; write it as a piece of the list")
        late = [number for number, config in enumerate(self.pieces) if number and config.name == _WHOLE_PICTURES]
        if late:
            raise ValueError(
                f"pieces.{late[0]} = {_WHOLE_PICTURES}: files are cropped while they are decoded, before all else; "
                f"needed it as the first piece"
            )
        return self


_WHOLE_PICTURES = "resized_crop"
"""The piece that decoders carry out on files, for pixels that their frames have lost."""


def _config(name: str, **values: Any) -> Any:
    return piece("augmentation", name).Config(**values)


class Evaluation(Settings):
    """How an image is brought to image_size in evaluation. A centre crop of image_size always follows."""

    resize: Annotated[int, Field(ge=1)] | None = None
    """Pixels of the short side before the centre crop (256 for ImageNet at 224); null follows the small-image rule."""


class DatasetConfig(Settings):
    """A data set: where its images are, which of them are used, and what they look like to the network."""

    model_config = ConfigDict(defer_build=True)

    name: str
    """As shown in tables and used to look up schedules, e.g. cifar100_lt."""
    source: Literal["digits", "fashion_mnist", "cifar10", "cifar100", "image_folder", "image_list"]
    """Which reader opens it."""

    root: str | None = None
    """Folder of the files. Not needed for digits. With download=true and no root: ~/.cache/expertail/<source>."""
    download: bool = False
    """Fetch what is missing (fashion_mnist, cifar10, cifar100) and check it against the published md5 sums."""
    train_list: str | None = None
    """image_list: text file of `path label` lines, looked up as given and then in root."""
    val_list: str | None = None
    """image_list: as train_list; null for none."""
    test_list: str | None = None
    """image_list: as train_list; null holds out test_per_class or test_fraction."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Number of classes; null takes the number found. If set, it must equal that number."""

    imbalance_ratio: Annotated[float, Field(ge=1)] | None = None
    """Largest class count over smallest, no unit; 1 is balanced; null keeps the natural counts."""
    imbalance_type: Literal["exp", "step"] = "exp"
    """exp: counts fall geometrically over the class index; step: the first half has the largest count, the rest the
    smallest."""
    max_per_class: Annotated[int, Field(ge=1)] | None = None
    """Images of the largest class (5000 for CIFAR-10, 500 for CIFAR-100); null is the smallest class of the source.
    With natural counts: at most this many of each class."""
    balanced: bool = False
    """The survey's balanced variant: round(N / C) images of every class, N the total that the keys above give."""
    val_per_class: Annotated[int, Field(ge=0)] = 0
    """Images of each class cut from the training pool for validation."""
    test_per_class: Annotated[int, Field(ge=0)] = 0
    """Images of each class held out for the test where the source has no test set (digits, folders, lists)."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of each class held out for the test where the source has no test set, instead of test_per_class. Rounded
    half up, at least one image of each class; the only image of a class stays in training."""
    index_groups: tuple[int, int] | None = None
    """Many, medium and few by index: where the classes, sorted by falling training count, are cut; null for none."""

    image_size: Annotated[int, Field(ge=8)] = 32
    """Pixels of the square image that the network sees."""
    mean: ChannelValues = (0.5, 0.5, 0.5)
    """Red, green, blue on a scale of 0 to 1, subtracted. One-channel images are repeated onto three."""
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5,) * 3
    """Red, green, blue on a scale of 0 to 1, divided by after the mean is subtracted."""
    augment: Augment = Field(default_factory=Augment)  # not while this module is imported
    """Training only."""
    eval: Evaluation = Evaluation()
    """Validation and test only."""

    resident: Literal["auto", "always", "never"] = "auto"
    """Whether image files are decoded once and kept, as uint8 on the device. auto: where a split takes at most
    resident_mib, and the training split is not cropped from whole pictures (random_resized_crop). Arrays always are."""
    resident_mib: Annotated[int, Field(ge=0)] = 512
    """Limit per split, MiB, at 3 x image_size x image_size bytes per image. The same limit again holds for the features
    of a split, which are kept where only heads learn."""
    loader_processes: Annotated[int, Field(ge=0)] = 0
    """Processes that decode streamed files, per worker; 0 decodes in the worker. Never changes a batch."""
    quarantine: Annotated[int, Field(ge=0)] = 0
    """Number of training images that may be left out because they cannot be read; with more, the run is refused. If
    above 0, one worker decodes every file of the run once before training; files of resident sets are decoded anyway.
    Validation and test images are never left out."""

    @model_validator(mode="after")
    def _keys_fit_together(self) -> DatasetConfig:
        problems = []
        lists = [k for k in ("train_list", "val_list", "test_list") if getattr(self, k) is not None]
        if self.source != "image_list" and lists:
            problems.append(f"{', '.join(lists)}: only for source=image_list, found source={self.source}")
        if self.source == "image_list" and self.train_list is None:
            problems.append("train_list is not set; source=image_list needs a file of `path label` lines")
        if self.download and self.source not in ("fashion_mnist", "cifar10", "cifar100"):
            problems.append(f"download=true: source={self.source} cannot be downloaded; set download=false and root")
        if self.quarantine and self.source not in ("image_folder", "image_list"):
            problems.append(f"quarantine = {self.quarantine}: {self.source} has no image files; set quarantine=0")
        if self.val_list is not None and self.val_per_class:
            problems.append(
                f"val_list and val_per_class = {self.val_per_class} are both set; set val_per_class=0 or val_list=null"
            )
        if self.test_fraction is not None and self.test_per_class:
            problems.append(
                f"test_fraction = {self.test_fraction:g} and test_per_class = {self.test_per_class} are both set; set "
                f"test_per_class=0 or test_fraction=null"
            )
        if self.eval.resize is not None and self.eval.resize < self.image_size:
            problems.append(f"eval.resize = {self.eval.resize} is smaller than image_size = {self.image_size}")
        if self.index_groups is not None and not 0 < self.index_groups[0] < self.index_groups[1]:
            problems.append(f"index_groups = {list(self.index_groups)}: needs 0 < first cut < second cut")
        if self.imbalance_type == "step" and self.imbalance_ratio is None:
            problems.append("imbalance_type = step needs imbalance_ratio")
        if problems:
            raise ValueError("; ".join(problems))
        return self
