"""Kept images as the labelling page shows them."""

from collections.abc import Callable, Sequence

from models.kept import KeptFolder, KeptImage, Label, LabelledImage, Verdict
from models.kept.records import now
from models.labelling.source import GivenLabel, Item, NewLabel

OnLabel = Callable[[KeptImage, Label], None]


class KeptSource:
    """The images of a `KeptFolder`."""

    saves_who = True
    allows_new_classes = True

    def __init__(
        self,
        folder: KeptFolder,
        get_classes: Callable[[], Sequence[str]] = list,
        on_first_label: OnLabel | None = None,
    ):
        """`get_classes` returns those of the model; `on_first_label` is told of new labels."""
        self.folder = folder
        self.location = folder.location
        self.get_classes = get_classes
        self.on_first_label = on_first_label
        self.images: dict[str, KeptImage] = {}  # of the last `list_items`

    def list_items(self) -> list[Item]:
        """Return the images whose files are there."""
        entries = self.folder.read()
        self.images = {entry.image.digest: entry.image for entry in entries}
        return [_build_item(entry) for entry in entries]

    def list_classes(self, items: list[Item]) -> list[str]:
        """Return the classes of the model, then those of guesses and of labels."""
        names = dict.fromkeys(self.get_classes())
        for item in items:
            names |= dict.fromkeys(label for label, _ in item.guesses)
        for item in items:
            if item.label is not None and item.label.verdict is Verdict.CLASS:
                names[item.label.label] = None
        return list(names)

    def read_image(self, item_id: str) -> bytes:
        """Return an image file."""
        image = self.images.get(item_id) or self.folder.read_images().get(item_id)
        if image is None:
            raise FileNotFoundError(item_id)
        return self.folder.read_file(image)

    def save(self, labels: list[NewLabel]) -> list[str]:
        """Append the labels of the images that are there."""
        entries = {entry.image.digest: entry for entry in self.folder.read()}
        time = now()
        lines: list[Label] = []
        gone: list[str] = []
        for new in labels:
            if new.id in entries:
                line = Label(
                    digest=new.id, verdict=new.verdict, label=new.label, who=new.who, time=time
                )
                lines.append(line)
            else:
                gone.append(new.id)
        if lines:
            self.folder.add_labels(lines)
        if self.on_first_label is not None:
            for line in lines:
                entry = entries[line.digest]
                if entry.label is None:
                    self.on_first_label(entry.image, line)
        return gone


def _build_item(entry: LabelledImage) -> Item:
    image = entry.image
    return Item(
        id=image.digest,
        guesses=[(choice.label, choice.confidence) for choice in image.top],
        reasons=[reason.value for reason in image.reasons],
        label=None if entry.label is None else _describe(entry.label),
        others=tuple(_describe(other) for other in entry.others),
        embedding=image.read_embedding(),
        embedding_kind=f"{image.model.name} {image.model.version}",
        arrived=image.time.timestamp(),
    )


def _describe(label: Label) -> GivenLabel:
    return GivenLabel(label.verdict, label.label, label.who)
