"""Samples that a run must not see again, and what takes their places.

The substitute at a place of the global batch is the sample at the same place in the next step of
the same task, shown once more under another epoch, so that it gets other noise. Which one that is
depends on nothing but the order and the set of quarantined ids.
"""

from dataclasses import replace

from mdm.data.order import Draw, Order

LATER = 1 << 20  # added to a substitute's epoch
REACH = 10_000  # steps that are looked through


def substituted(order: Order, step: int, quarantined: frozenset[str]) -> Draw:
    """The global draw of `step` with quarantined samples replaced.

    Raises:
        ValueError: everything that might take a place is quarantined too.
    """
    draw = order.draw(step)
    if not quarantined:
        return draw
    places = [i for i, name in enumerate(draw.ids) if name in quarantined]
    if not places:
        return draw
    sources, rows, epochs = draw.sources.copy(), draw.rows.copy(), draw.epochs.copy()
    ids = list(draw.ids)
    for later in range(step + 1, step + 1 + REACH):
        other = order.draw(later)
        if other.task != draw.task:
            continue
        for i in [i for i in places if other.ids[i] not in quarantined]:
            sources[i], rows[i] = other.sources[i], other.rows[i]
            epochs[i], ids[i] = other.epochs[i] + LATER, other.ids[i]
            places.remove(i)
        if not places:
            return replace(draw, sources=sources, rows=rows, epochs=epochs, ids=ids)
    raise ValueError(
        f"step {step}: {len(places)} of {len(ids)} samples are quarantined, and all that might "
        f"take their places in {REACH} steps is too"
    )
