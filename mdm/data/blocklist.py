"""Samples that a run must not see again, and what takes their places.

The substitute at a place of the global batch is the sample at the same place in the next step of
the same task, used once more under a different epoch, so that it gets different noise. It depends
only on the sample order and the set of blocked ids.
"""

from dataclasses import replace

from mdm.data.order import Draw, SampleOrder

LATER = 1 << 20  # added to a substitute's epoch
REACH = 10_000  # steps searched for substitutes


def substituted(order: SampleOrder, step: int, blocklist: frozenset[str]) -> Draw:
    """The global draw of `step` with blocked samples replaced.

    Raises:
        ValueError: all possible substitutes are blocked too.
    """
    draw = order.draw(step)
    places = [i for i, name in enumerate(draw.ids) if name in blocklist] if blocklist else []
    if not places:
        return draw
    sources, rows, epochs = draw.sources.copy(), draw.rows.copy(), draw.epochs.copy()
    ids = list(draw.ids)
    for later in range(step + 1, step + 1 + REACH):
        other = order.draw(later)
        if other.task != draw.task:
            continue
        for i in [i for i in places if other.ids[i] not in blocklist]:
            sources[i], rows[i] = other.sources[i], other.rows[i]
            epochs[i], ids[i] = other.epochs[i] + LATER, other.ids[i]
            places.remove(i)
        if not places:
            return replace(draw, sources=sources, rows=rows, epochs=epochs, ids=ids)
    raise ValueError(
        f"step {step}: {len(places)} of {len(ids)} samples are on the blocklist, and so are all "
        f"possible substitutes in the next {REACH} steps"
    )
