"""What the methods of each client return: results, or what gives them to `await` and `async for`.

For type checkers alone; the methods themselves are in methods.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raptide.client.methods import Methods

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
    from typing import Any, Literal, Unpack, overload

    import numpy as np

    from raptide.client.methods import Options
    from raptide.methods import Long, Pooling, ScanMethod, ScoreMethod, VariantMethod

    class BlockingMethods(Methods):
        @overload
        def embed(
            self,
            sequences: Iterator[str],
            pooling: Pooling = ...,
            layers: Sequence[int] | None = ...,
            long: Long = ...,
            **options: Unpack[Options],
        ) -> Iterator[np.ndarray]: ...
        @overload
        def embed(
            self,
            sequences: Sequence[str],
            pooling: Literal["mean", "bos"] = ...,
            layers: Sequence[int] | None = ...,
            long: Long = ...,
            **options: Unpack[Options],
        ) -> np.ndarray: ...
        @overload
        def embed(
            self,
            sequences: Sequence[str],
            pooling: Pooling,
            layers: Sequence[int] | None = ...,
            long: Long = ...,
            **options: Unpack[Options],
        ) -> np.ndarray | list[np.ndarray]: ...
        def embed(self, *args: Any, **options: Any) -> Any: ...

        @overload
        def logits(
            self, sequences: Iterator[str], long: Long = ..., **options: Unpack[Options]
        ) -> Iterator[np.ndarray]: ...
        @overload
        def logits(
            self, sequences: Sequence[str], long: Long = ..., **options: Unpack[Options]
        ) -> list[np.ndarray]: ...
        def logits(self, *args: Any, **options: Any) -> Any: ...

        @overload
        def contacts(
            self, sequences: Iterator[str], **options: Unpack[Options]
        ) -> Iterator[np.ndarray]: ...
        @overload
        def contacts(
            self, sequences: Sequence[str], **options: Unpack[Options]
        ) -> list[np.ndarray]: ...
        def contacts(self, *args: Any, **options: Any) -> Any: ...

        @overload
        def score_sequences(
            self,
            sequences: Iterator[str],
            method: ScoreMethod = ...,
            long: Long = ...,
            **options: Unpack[Options],
        ) -> Iterator[float]: ...
        @overload
        def score_sequences(
            self,
            sequences: Sequence[str],
            method: ScoreMethod = ...,
            long: Long = ...,
            **options: Unpack[Options],
        ) -> np.ndarray: ...
        def score_sequences(self, *args: Any, **options: Any) -> Any: ...

        def score_variants(
            self,
            sequence: str,
            variants: Sequence[str],
            method: VariantMethod = ...,
            long: Long = ...,
            **options: Unpack[Options],
        ) -> np.ndarray: ...

        def scan(
            self,
            sequence: str,
            method: ScanMethod = ...,
            long: Long = ...,
            **options: Unpack[Options],
        ) -> np.ndarray: ...

    class AsyncMethods(Methods):
        @overload
        def embed(
            self,
            sequences: Iterator[str] | AsyncIterator[str],
            pooling: Pooling = ...,
            layers: Sequence[int] | None = ...,
            long: Long = ...,
            **options: Unpack[Options],
        ) -> AsyncIterator[np.ndarray]: ...
        @overload
        def embed(
            self,
            sequences: Sequence[str],
            pooling: Literal["mean", "bos"] = ...,
            layers: Sequence[int] | None = ...,
            long: Long = ...,
            **options: Unpack[Options],
        ) -> Awaitable[np.ndarray]: ...
        @overload
        def embed(
            self,
            sequences: Sequence[str],
            pooling: Pooling,
            layers: Sequence[int] | None = ...,
            long: Long = ...,
            **options: Unpack[Options],
        ) -> Awaitable[np.ndarray | list[np.ndarray]]: ...
        def embed(self, *args: Any, **options: Any) -> Any: ...

        @overload
        def logits(
            self,
            sequences: Iterator[str] | AsyncIterator[str],
            long: Long = ...,
            **options: Unpack[Options],
        ) -> AsyncIterator[np.ndarray]: ...
        @overload
        def logits(
            self, sequences: Sequence[str], long: Long = ..., **options: Unpack[Options]
        ) -> Awaitable[list[np.ndarray]]: ...
        def logits(self, *args: Any, **options: Any) -> Any: ...

        @overload
        def contacts(
            self, sequences: Iterator[str] | AsyncIterator[str], **options: Unpack[Options]
        ) -> AsyncIterator[np.ndarray]: ...
        @overload
        def contacts(
            self, sequences: Sequence[str], **options: Unpack[Options]
        ) -> Awaitable[list[np.ndarray]]: ...
        def contacts(self, *args: Any, **options: Any) -> Any: ...

        @overload
        def score_sequences(
            self,
            sequences: Iterator[str] | AsyncIterator[str],
            method: ScoreMethod = ...,
            long: Long = ...,
            **options: Unpack[Options],
        ) -> AsyncIterator[float]: ...
        @overload
        def score_sequences(
            self,
            sequences: Sequence[str],
            method: ScoreMethod = ...,
            long: Long = ...,
            **options: Unpack[Options],
        ) -> Awaitable[np.ndarray]: ...
        def score_sequences(self, *args: Any, **options: Any) -> Any: ...

        def score_variants(
            self,
            sequence: str,
            variants: Sequence[str],
            method: VariantMethod = ...,
            long: Long = ...,
            **options: Unpack[Options],
        ) -> Awaitable[np.ndarray]: ...

        def scan(
            self,
            sequence: str,
            method: ScanMethod = ...,
            long: Long = ...,
            **options: Unpack[Options],
        ) -> Awaitable[np.ndarray]: ...

else:
    BlockingMethods = AsyncMethods = Methods
