"""The list of backends, in order: what is on it, how it got there, and the names it answers to.

Everything on the list came through ``register``: this package's own classes, and those of others by decorator or by
entry point (``plugins``). An entry point puts a backend at the end, behind ``naive``, which serves everything:
installing a plug-in never changes automatic choice, it runs when it is named or preferred.
"""

from __future__ import annotations

import contextlib
import difflib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from ..base import Backend
from . import plugins
from .admission import comes_with_flashmha, made
from .plugins import Unusable

B = TypeVar("B", bound=type[Backend])
entries: dict[str, Backend] = {}
"""The list. It is replaced and never changed, so that a thread reads one state of it."""
brought_by: dict[str, str] = {}
"""Backend name -> the package whose entry point brought it."""
preferred: frozenset[str] = frozenset()
"""Backends that stay where ``prefer`` put them, whatever was measured. It is replaced before ``entries`` is."""
complete = False
"""The plug-ins are on the list."""
list_lock = threading.RLock()
"""Held while the list is replaced, and never while anything is imported, which waits for locks of its own."""


class Discovery(threading.local):
    """A flag a thread: it is importing plug-ins."""

    running = False


discovery = Discovery()


def register(backend: B, *, before: str | None = None) -> B:
    """Add a backend class to the end of the list, or in front of another; a decorator.

    Raises:
        TypeError: no ``Backend`` class, or one without a name and limits.
        ValueError: the name is taken, or the class was written for a contract this release does not keep.
    """
    if before is not None and before not in entries:
        discover()
        find_backend(before, "before", or_family=False)
    add(made(backend), before)
    return backend


def prefer(name: str, *, before: str | None = None) -> None:
    """Move a backend in front of another on the list, or of all of them: automatic choice asks it there.

    It stays there, in this process, whatever was measured. ``prefer("mine", before="sdpa")`` is how a backend that a
    package brought is chosen without being named; ``unregister`` takes one off the list.

    Raises:
        ValueError: there is no backend of that name.
    """
    global entries, preferred
    discover()
    find_backend(name, "name", or_family=False)
    if before is not None:
        find_backend(before, "before", or_family=False)
        if before == name:
            raise ValueError(f"before must be another backend, got {before!r}.")
    with list_lock:
        rest = [row for row in entries.items() if row[0] != name]
        place = 0 if before is None else [other for other, _ in rest].index(before)
        preferred |= {name}
        entries = dict([*rest[:place], (name, entries[name]), *rest[place:]])


def add(backend: Backend, before: str | None = None) -> None:
    """Put a backend on the list."""
    global entries
    name = backend.name
    with list_lock:
        members = families().get(name)
        if members is not None:
            raise ValueError(f"name must not be taken, got {name!r}, which stands for {', '.join(members)}.")
        if backend.family in entries:
            raise ValueError(f"family must not be the name of a backend, got {backend.family!r} on {name}.")
        if name in entries:
            where = "" if before is None else f", before={before!r}"
            raise ValueError(
                f"name must not be taken, got {name!r}; unregister({name!r}) first to replace it, "
                f"or prefer({name!r}{where}) to move it."
            )
        rows = list(entries.items())
        place = len(rows) if before is None else list(entries).index(before)
        rows.insert(place, (name, backend))
        entries = dict(rows)


def any_backend(question: Callable[[Backend], bool]) -> bool:
    """A backend on the list answers a question with yes."""
    discover()
    return any(map(question, entries.values()))


def is_taken(name: str) -> bool:
    return name in entries or name in families()


def families() -> dict[str, tuple[str, ...]]:
    """Family -> the backends that say so, in the order of the list."""
    found: dict[str, tuple[str, ...]] = {}
    for name, backend in entries.items():
        if backend.family is not None:
            found[backend.family] = (*found.get(backend.family, ()), name)
    return found


class Families(Mapping[str, tuple[str, ...]]):
    """``families()`` of the list as it is at each look."""

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return families()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(families())

    def __len__(self) -> int:
        return len(families())


FAMILIES = Families()
"""One name for several backends, in the order they are tried."""


def unregister(name: str) -> None:
    """Take a backend off the list, so that no call asks it; another class may have its name then.

    Raises:
        ValueError: there is no backend of that name.
    """
    global entries, preferred
    discover()
    find_backend(name, "name", or_family=False)
    with list_lock:
        preferred -= {name}
        entries = {other: backend for other, backend in entries.items() if other != name}
        brought_by.pop(name, None)


@contextlib.contextmanager
def instead(*backends: Backend) -> Iterator[None]:
    """Backends in the places of those of their names, inside the ``with``: what a test made with its own machine.

    Behind it the list is as it was before, whatever was done to it inside.
    """
    global entries, preferred
    discover()
    with list_lock:
        before, here = (entries, preferred), {backend.name: backend for backend in backends}
        entries = {name: here.get(name, backend) for name, backend in entries.items()}
    try:
        yield
    finally:
        with list_lock:
            entries, preferred = before


def discover() -> None:
    """Take the plug-ins onto the list, once, on its first use; one that cannot be taken stays with its reason.

    A package that asks for the list while it is imported gets the list without plug-ins.
    """
    global complete
    if complete or discovery.running:
        return
    discovery.running = True
    try:
        offers = [(name, package, attempt(load)) for name, package, load in plugins.find_offers()]
        with list_lock:
            if not complete:
                for name, package, found in offers:
                    take_in(name, package, found)
                complete = True
    finally:
        discovery.running = False


# What torch.compiler.assume_constant_result sets, which would import the compiler: a first use under fullgraph=True
# discovers while the graph is traced.
discover._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attempt(load: Callable[[], object]) -> object:
    """Import a plug-in: what that gives, or the error it raises."""
    try:
        return plugins.load_class(load)
    except (Exception, SystemExit) as error:
        return error


def take_in(name: str, package: str, found: object) -> None:
    """Put what a plug-in's import gave on the list, as ``Unusable`` where it is no backend."""
    try:
        if isinstance(found, BaseException):
            raise found
        if type(entries.get(name)) is not found:  # else the module itself called register
            backend = made(found)
            if backend.name != name:
                raise ValueError(f"name must be {name!r}, as the entry point says, got {backend.name!r}.")
            add(backend)
    except (Exception, SystemExit) as error:
        while is_taken(name):
            name = f"{name} of {package}"
        add(Unusable(name, error))
    brought_by[name] = package


def names() -> tuple[str, ...]:
    """The registered backends, in order."""
    discover()
    return tuple(entries)


def get(name: str) -> Backend:
    """The backend of a name; ``ValueError`` with the names there are."""
    discover()
    return find_backend(name, "backend")


def find_backend(name: str, said: str, or_family: bool = True) -> Backend:
    """The backend of a name; ``said`` is where the name stood, and whether a family could, for the error."""
    if not isinstance(name, str) or name not in entries:
        known = (*entries, *families()) if or_family else tuple(entries)
        near = difflib.get_close_matches(name.lower(), known, n=1) if isinstance(name, str) else []
        hint = f"; say {near[0]!r}" if near else ""
        raise ValueError(f"{said} must be one of {', '.join(known)}, got {name!r}{hint}.")
    return entries[name]


def expand(wanted: str | Sequence[str], said: str = "backend") -> tuple[str, ...]:
    """Backend names out of one name, a family, or a list of both."""
    discover()
    if not isinstance(wanted, str):
        if not isinstance(wanted, (list, tuple)):
            raise TypeError(f"{said} must be a name, a family or a list of them, got {wanted!r}.")
        if not wanted:
            raise ValueError(f"{said} must name at least one backend, got {wanted!r}.")
        return tuple(name for one in wanted for name in expand(one, said))
    members = () if wanted in entries else families().get(wanted, ())
    return members or (find_backend(wanted, said).name,)


def origin(name: str) -> str:
    """The origin of a backend: flashmha, a package and its version, or the module of the class."""
    backend = get(name)
    return brought_by.get(name) or ("flashmha" if comes_with_flashmha(backend) else type(backend).__module__)
