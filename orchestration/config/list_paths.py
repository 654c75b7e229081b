"""Places of a data set's lists: found when a config is composed, so that later commands work from any folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from experts.data.config import DatasetConfig
from experts.data.lists import LISTS, find_list


def absolute_lists(data: DatasetConfig) -> dict[str, str]:
    """Return the paths of a set's lists, absolute, by key.

    A list that is not found here is left as it is, but for a bare name, which means the one in root: on a cluster, only
    the workers may see it.
    """
    places = {}
    for key, value in _values(data).items():
        if (place := find_list(data.root, value)) is not None:
            places[key] = os.path.abspath(place)
        elif data.root is not None and not os.path.dirname(value):
            places[key] = os.path.join(data.root, value)
    return places


def unread_lists(data: DatasetConfig, places: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each list of which there is another one, in this folder or in root, that is not read."""
    for key, value in _values(data).items():
        given = os.path.expanduser(value)
        others = [os.path.abspath(os.path.join(folder, given)) for folder in (data.root or ".", ".")]
        unread = [path for path in others if os.path.isfile(path) and path != places.get(key)]
        if unread and key in places:
            yield f"dataset.{key} = {value}: {places[key]} is read, {unread[0]} is not"


def moved_lists(data: DatasetConfig, old_root: str | None) -> dict[str, str]:
    """Return the lists that lay below another root as paths below the one that a set has now."""
    if old_root is None or data.root is None or old_root == data.root:
        return {}
    inside = os.path.join(old_root, "")
    values = _values(data).items()
    return {key: os.path.join(data.root, value[len(inside) :]) for key, value in values if value.startswith(inside)}


def _values(data: DatasetConfig) -> dict[str, str]:
    return {key: value for key in LISTS if (value := getattr(data, key)) is not None}
