"""Show the five most probable labels of a picture: `nfzoo space`, or a Space that runs this file.

`Gallery` loads the models and labels pictures, without Gradio; `build` makes the page.
"""

from __future__ import annotations

import functools
import html
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nfzoo import from_pretrained
from nfzoo.checkpoint.model_folder import CONFIG_FILE
from nfzoo.errors import ConfigError, DataError, NfzooError
from nfzoo.hub.registry import HUB, PUBLIC, repository_of
from nfzoo.nn import NFNet
from nfzoo.predict import classify
from nfzoo.runtime.output import escaped

logger = logging.getLogger("nfzoo")

MODELS_VARIABLE = "NFZOO_SPACE_MODELS"
MAX_UPLOAD = 32 << 20  # bytes of a picture
KEPT = 2  # models in memory; the largest takes 1.8 GB, a free Space has 16
TOP = 5


class SpaceError(NfzooError, RuntimeError):
    """A message for the user of the Space, who may be anybody: it names no path of the server."""


class Gallery:
    """Models to choose from, loaded when they are first used; the last `kept` stay in memory.

    Args:
        sources: what `from_pretrained` takes; a folder of checkpoint folders stands for all of them.
        load: makes a model of a source.

    Raises:
        UnknownModelError: for a source that is neither on disk, nor a Hub repository, nor a zoo model with weights.
    """

    def __init__(
        self, sources: Sequence[str], *, load: Callable[[str], NFNet] = from_pretrained, kept: int = KEPT
    ) -> None:
        self.sources = named(sources)
        self._load, self._kept = load, kept
        self._loaded: OrderedDict[str, NFNet] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def choices(self) -> list[str]:
        return list(self.sources)

    def model(self, choice: str) -> NFNet:
        """Return the model of a choice, loaded once while it is kept; raise a `SpaceError` if it cannot be."""
        if choice not in self.sources:
            raise SpaceError(f"There is no model {choice!r} here. Choose one from the list.")
        with self._lock:
            if choice not in self._loaded:
                try:
                    self._loaded[choice] = _lean(self._load(self.sources[choice]).eval())
                except (NfzooError, OSError) as error:
                    logger.warning("%s cannot be loaded: %s", self.sources[choice], error)
                    raise SpaceError(f"{choice} cannot be loaded. The log of the server says why.") from error
            self._loaded.move_to_end(choice)
            while len(self._loaded) > self._kept:
                self._loaded.popitem(last=False)
            return self._loaded[choice]

    def look(self, picture: str | Path | None, choice: str | None) -> dict[str, float] | None:
        """Return the most probable labels of a picture, best first, with probabilities; `None` without a picture.

        Of a multi-label model these are all that reach their thresholds, perhaps none.

        Raises:
            SpaceError: for a picture or a model that cannot be used, in words for the user.
        """
        if picture is None:
            return None
        if choice is None:
            raise SpaceError("Choose a model first.")
        model = self.model(choice)
        try:
            pixels = model.preprocess(picture)
        except DataError as error:
            reason = str(error).removeprefix(f"{picture} ").replace(str(picture), "the picture")
            raise SpaceError(f"The picture cannot be read: it {reason}.") from error
        try:
            (top,) = classify(model, [pixels], topk=None if model.multi_label else TOP)
        except NfzooError as error:
            raise SpaceError(f"{choice} gives no answer: {error}.") from error
        shown = [(escaped(label), p) for label, p in top]
        twice = {label for label, count in Counter(label for label, _ in shown).items() if count > 1}
        return {f"{label} ({i})" if label in twice else label: p for i, (label, p) in enumerate(shown, start=1)}


def _lean(model: NFNet) -> NFNet:
    """Return the folded model, with its weights laid out for one picture at a time."""
    return (model if model.config.folded else model.for_inference()).prepack()


def named(sources: Sequence[str]) -> dict[str, str]:
    """Return name to choose -> source. The name is the source's last part, or all of it where two would be the same."""
    expanded: list[str] = []
    for source in sources:
        folder = Path(source)
        if folder.is_dir() and not (folder / CONFIG_FILE).is_file():
            inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
            if not inside:
                raise ConfigError(f"{source!r} holds no model: neither {CONFIG_FILE} nor folders with one")
            expanded += map(str, inside)
        else:
            if not folder.exists():
                repository_of(source)
            expanded.append(source)
    expanded = list(dict.fromkeys(expanded))
    short = {source: _last_part(source) for source in expanded}
    count = Counter(short.values())
    return {name if count[name] == 1 else source: source for source, name in short.items()}


def _last_part(source: str) -> str:
    path = Path(source)
    return (
        path.resolve().name
        if path.is_dir()
        else source.removeprefix(HUB)
        if not path.exists()
        else f"{path.parent.name}/{path.name}"
    )


def offered(environment: str | None) -> list[str]:
    """Return the sources in `NFZOO_SPACE_MODELS`, split at commas, or else the zoo's models with public weights."""
    parts = [part.strip() for part in (environment or "").split(",")]
    return [part for part in parts if part] or list(PUBLIC)


def build(gallery: Gallery) -> Any:
    """Build the page, a `gradio.Blocks`.

    Raises:
        ConfigError: without Gradio.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ConfigError("the Space needs Gradio: pip install 'nfzoo[space]'") from error

    def look(picture: str | None, choice: str | None) -> dict[str, float] | None:
        try:
            return gallery.look(picture, choice)
        except SpaceError as error:
            text = html.escape(escaped(str(error)), quote=False)  # Gradio shows it as HTML
            raise gr.Error(text, print_exception=False) from error

    with gr.Blocks(title="nfzoo", analytics_enabled=False) as page:
        gr.Markdown("# Normalizer-Free networks\nGive a picture, choose a model, and see what it takes it for.")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", type="filepath", sources=["upload", "clipboard"], height=360)
                # The file itself, undecoded: orientation, transparency, depth and damage are dealt with as everywhere
                # in nfzoo. Gradio calls this after it has made sure that the file is one that was uploaded.
                picture.preprocess = lambda payload: None if payload is None else payload.path
                choice = gr.Dropdown(gallery.choices, value=gallery.choices[0], label="Model")
            with gr.Column():
                answer = gr.Label(label="Most probable labels")  # as many as `look` gives
        # A client calls this one by its name: `Client(URL).predict(handle_file(PATH), MODEL, api_name="/predict")`.
        picture.change(look, [picture, choice], answer, show_progress="minimal", api_name="predict")
        choice.change(look, [picture, choice], answer, show_progress="minimal", api_visibility="private")
    return page


def main(
    models: Sequence[str] = (),
    *,
    port: int | None = None,
    require_hash: bool = False,
    allow_pickle: bool = False,
    on_start: Callable[[str, list[str]], None] | None = None,
) -> None:
    """Serve the page until it is interrupted, on 127.0.0.1 or where `GRADIO_SERVER_NAME` says.

    Args:
        models: sources to choose from; by default see `offered`.
        port: by default the first free one from 7860 on.
        require_hash, allow_pickle: see `nfzoo.from_pretrained`.
        on_start: takes the page's address and the names of the models, once it answers.
    """
    load = functools.partial(from_pretrained, require_hash=require_hash, allow_pickle=allow_pickle)
    gallery = Gallery(list(models) or offered(os.environ.get(MODELS_VARIABLE)), load=load)
    page, how = build(gallery), {"server_port": port, "footer_links": [], "max_file_size": MAX_UPLOAD}
    if on_start is None:
        page.launch(**how)
    else:
        on_start(page.launch(**how, prevent_thread_lock=True)[1], gallery.choices)
        page.block_thread()


if __name__ == "__main__":
    main()
