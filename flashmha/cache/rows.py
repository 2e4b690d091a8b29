"""Rows of a cache in another order."""

from __future__ import annotations

import abc

from torch import Tensor

from .checks import check_order


class Rows(abc.ABC):
    """What holds something for each row of a batch, and can put the rows in order."""

    @property
    @abc.abstractmethod
    def batch(self) -> int:
        """Rows."""

    @abc.abstractmethod
    def by_row(self) -> list[Tensor]:
        """The tensors whose first axis are the rows."""

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was, as beams of a search do: (batch,) integers.

        Raises:
            ValueError: rows that are not there (on a GPU an error of the device), too few pages; nothing has changed.
        """
        self.prepare_reorder(rows)
        self.put_in_order(rows)

    def prepare_reorder(self, rows: Tensor) -> None:
        """Raise where rows cannot be put in that order."""
        check_order(rows, self.batch)

    def put_in_order(self, rows: Tensor) -> None:
        """``reorder`` behind its checks."""
        for tensor in self.by_row():
            tensor.copy_(tensor.index_select(0, rows))
