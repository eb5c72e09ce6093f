"""The module that TorchServe loads from a ``.mar``: one class, which is all it may define."""

from pagetier.handler.service import PagetierHandler as _Base


class PagetierHandler(_Base):
    """The handler of the installed package, under the archive's own module name."""
