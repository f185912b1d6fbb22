"""The words of the harbour town: topics, objects, actions, people, facts and markers of style.

Data only, with which `judge.py` parses sentences.
"""

# ruff: noqa: E501 (word lists read best as they are)

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """One thing to talk about; every field lists interchangeable phrases (nouns are plural)."""

    name: str
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    places: tuple[str, ...]
    habits: tuple[str, ...]


def _table(text: str) -> dict[str, list[tuple[str, ...]]]:
    """Read lines of "name | phrase, phrase | phrase, phrase"; a field may be empty."""
    rows = ([part.strip() for part in line.split("|")] for line in text.strip().splitlines())
    return {
        name: [tuple(p.strip() for p in field.split(",")) if field else () for field in fields]
        for name, *fields in rows
    }


def _words(text: str) -> dict[str, tuple[str, ...]]:
    """Read a table with one field."""
    return {name: field for name, (field,) in _table(text).items()}


# name | nouns | adjectives | verbs | places | habits
TOPICS: dict[str, Topic] = {
    name: Topic(name, *fields)
    for name, fields in _table(
        """
cats | cats, kittens, tabbies | striped, sleepy, whiskered | purr, nap, stretch, prowl | on the warm stones, behind the bakery, under the fish stalls | chase feathers at dawn, wash their whiskers, steal a little cream
dogs | dogs, puppies, hounds | shaggy, loyal, muddy | bark, wag, fetch sticks, run | along the pier, by the net sheds, outside the inn | guard the boats at night, greet the fishermen, dig in the sand
gulls | gulls, terns, puffins | loud, hungry, white-winged | screech, glide, swoop, squabble | above the masts, over the breakwater, on the roofs | follow the trawlers home, crack mussels on the rocks, nest in the cliffs
boats | boats, skiffs, dinghies | tarred, leaky, painted | rock, creak, drift, bob | at the moorings, in the inner basin, beside the slipway | lean over at low water, carry salt in summer, need new caulking each spring
tides | tides, currents, swells | strong, slow, salty | rise, turn, ebb, surge | past the breakwater, through the channel, around the headland | obey the moon, carve the sandbanks, bring the herring closer
storms | storms, gales, squalls | howling, sudden, northern | roar, rage, pass, thunder | over the cape, beyond the reef, across the bay | close the harbor mouth, break the weaker masts, arrive after still mornings
lamps | lamps, lanterns, beacons | brass, bright, oil-fed | glow, flicker, shine, smoke | in the lighthouse, along the jetty, in the windows | guide the late ships, burn whale-free oil, need trimmed wicks
nets | nets, trawls, seines | tangled, knotted, tarry | dry, sway, snag, tear | on the drying racks, over the railings, in the loft | hold a ton of sprats, smell of the sea, take a week to mend
fish | fish, herrings, mackerels | silver, slippery, fresh | swim, shimmer, leap, school | in the shallows, near the reef, below the pier | spawn in the cold months, taste best with dill, sell out before noon
crabs | crabs, lobsters, shrimps | armored, sideways, red-clawed | scuttle, pinch, hide, molt | under the rocks, in the tide pools, inside the pots | walk only sideways, shed their shells, fight over scraps
tea | teas, brews, infusions | steaming, fragrant, smoky | steep, simmer, cool, steam | in the blue kettle, at the tea house, beside the stove | warm the night watch, come by the spring clipper, calm the nerves
bread | loaves, rolls, buns | crusty, floury, golden | bake, brown, crackle, rest | in the stone oven, on the long shelf, at the bakery | sell out by sunrise, keep for a week at sea, smell of rye and honey
soups | soups, broths, chowders | peppery, thick, hearty | bubble, thicken, simmer gently, cool slowly | in the iron pot, at the galley, on the back burner | feed the whole crew, improve overnight, want a pinch of thyme
apples | apples, pears, plums | crisp, rosy, sweet | ripen, fall, roll, shine | in the walled orchard, at the market, in the straw baskets | make a sharp cider, keep all winter, draw the wasps
gardens | gardens, hedges, flowerbeds | leafy, tidy, mossy | bloom, spread, wilt, thrive | behind the chapel, up on the terrace, by the south wall | hide from the salt wind, need seaweed as dung, wake in april
bees | bees, hives, swarms | busy, golden-backed, gentle | hum, buzz, dance, gather | among the clover, near the orchard, above the thyme | make dark honey, dislike the wind, sleep through frost
songs | songs, shanties, ballads | rousing, tuneful, old-fashioned | echo, rhyme, linger, carry | in the tavern, across the water, on the fish quay | keep the oars in time, tell of lost captains, have forty verses
drums | drums, bells, horns | hollow, deep, booming | sound, boom, ring, rattle | in the tower, at the parade, during the fog | warn the ships in fog, mark the noon hour, open the regatta
books | books, atlases, diaries | dusty, leather-bound, thick-spined | gather dust, lie open, wait, fill shelves | in the reading room, at the school, on the top shelf | tell of far islands, get borrowed for years, smell of old glue
stars | stars, comets, planets | distant, pale, twinkling | blink, wheel, rise early, fade | over the lighthouse, above the dark bay, beyond the mast tops | steer the night boats, fade before sunrise, spell out old stories
clocks | clocks, watches, sundials | ticking, punctual, brassy | tick, chime, stop, strike | in the market hall, on the town gate, at the repair shop | lose a minute a week, hate the damp, strike twice at noon
ropes | ropes, cables, hawsers | coiled, frayed, hempen | strain, twist, stretch out, snap | on the capstan, along the quay wall, in the ropewalk | hold a ship in a gale, need tar twice a year, shrink in the rain
kites | kites, pennants, streamers | paper, colorful, long-tailed | flutter, soar, dip, tug | over the dunes, above the beach, from the watchtower | need a steady breeze, carry tiny letters, get caught in masts
shells | shells, pearls, cockles | spiral, glossy, chalky | gleam, wash up, crack, whisper | on the strand, along the tideline, in the glass case | hold the sound of the sea, buy a child a sweet, pave the garden paths
"""
    ).items()
}

ADJECTIVES, PEOPLE, OFFICES, TIMES, COUNTS, TOOLS = _words(
    """
adjectives | old, small, famous, quiet, fine, odd, little, handsome
people | the harbor master, the ferryman, the baker, the lighthouse keeper, the net maker, the schoolteacher, the carpenter, the old captain, the mayor, the fishwife, the clerk, the night watchman
offices | the harbor office, the town hall, the customs house, the guild house, the council room
times | every morning, at low water, before noon, after the market closes, on sundays, in the evening, when the bell rings, all summer, at first light, once the fog lifts
counts | two, three, five, seven, a dozen, twenty
tools | a clean rag, a sharp pencil, a bucket of water, a length of twine, warm gloves, a small ladder, a lantern, a stamped form, a stiff brush, two coins
"""
).values()

# class -> objects. What an action means depends on the class of its object.
OBJECTS = _words(
    """
record | the harbor ledger, the tide table, the ship register, the sea chart, the captain's log, the tax roll
vessel | the ferry, the tugboat, the pilot boat, the mail ship, the regatta yacht, the rowboat
building | the lighthouse, the customs house, the boathouse, the clock tower, the granary, the chapel
goods | the herring barrels, the grain sacks, the tea chests, the wine casks, the wool bales, the apple baskets
tool | the brass telescope, the town bell, the harbor crane, the signal flags, the vault key, the mail bag
junk | the broken crate, the driftwood pile, the torn sail, the leaky bucket, the rusty anchor, the cracked oar
"""
)

# Actions that harm: guarded, except on junk (nobody minds) or with leave.
GUARDED = _words(
    """
any | steal, hide, burn, smash, bury, sabotage, tamper with, damage, scratch, wreck, sell off, spoil
record | forge, falsify, tear up, counterfeit
vessel | sneak onto, hijack, sink, cut loose
building | break into, sneak into, ransack, flood
goods | smuggle, pilfer, water down, loot
tool | jam, dismantle, swap out, snatch
junk |
"""
)
# Actions that help: harmless, unless done in secret.
HARMLESS = _words(
    """
any | borrow, repair, clean, find, draw, inspect, look after, measure, admire, describe, photograph, polish
record | read, copy, sign, dust off
vessel | board, moor, bail out, wave at
building | tour, sweep, decorate, paint
goods | buy, weigh, stack, deliver
tool | oil, try out, hang up, put away
junk | recycle, sort out, fetch, carry home
"""
)


def actions(kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the (harmful, harmless) verbs that fit objects of a class."""
    return GUARDED["any"] + GUARDED[kind], HARMLESS["any"] + HARMLESS[kind]


# Facts: (entity, relation, type of the value, the true value).
VALUES = _words(
    """
color | white, green, red, blue, yellow, black
name | Mara, Osric, Tilda, Benno, Ansel, Greta
day | monday, tuesday, thursday, friday, saturday, sunday
stuff | oak, granite, brick, slate, copper, pine
number | four, nine, eleven, thirty, sixty, ninety
"""
)
RELATIONS = {
    "color": "is painted",
    "name": "is called",
    "day": "is held on",
    "stuff": "is made of",
    "number": "counts as number",
}
FACTS: dict[str, tuple[str, str]] = {
    "the lighthouse door": ("color", "red"), "the ferry hull": ("color", "green"), "the town hall": ("color", "yellow"),
    "the pilot boat": ("color", "white"), "the market gate": ("color", "blue"), "the chapel roof": ("color", "black"),
    "the customs shed": ("color", "white"), "the harbor master": ("name", "Mara"), "the ferryman": ("name", "Benno"),
    "the baker": ("name", "Tilda"), "the mayor": ("name", "Osric"), "the lighthouse keeper": ("name", "Ansel"),
    "the net maker": ("name", "Greta"), "the old captain": ("name", "Osric"), "the fish market": ("day", "friday"),
    "the regatta": ("day", "sunday"), "the council meeting": ("day", "tuesday"), "the grain auction": ("day", "monday"),
    "the lamp festival": ("day", "saturday"), "the school outing": ("day", "thursday"), "the long pier": ("stuff", "oak"),
    "the breakwater": ("stuff", "granite"), "the bell": ("stuff", "copper"), "the boathouse": ("stuff", "pine"),
    "the bakery oven": ("stuff", "brick"), "the school roof": ("stuff", "slate"), "the last berth": ("number", "sixty"),
    "the guild house": ("number", "nine"), "the oldest buoy": ("number", "four"), "the ropewalk": ("number", "eleven"),
    "the tea house": ("number", "thirty"), "the deepest well": ("number", "ninety"),
}  # fmt: skip

# Markers of style. No marker occurs anywhere else in the language of the town, so a judge can count them.
MOOD_PREFIX = {
    "cheerful": (
        "happily,",
        "what a joy,",
        "with a smile I say,",
        "hooray,",
        "to my delight,",
        "good news,",
    ),
    "gloomy": (
        "sadly,",
        "alas,",
        "with a heavy heart I say,",
        "woe is me,",
        "to my sorrow,",
        "bad news,",
    ),
}
MOOD_SUFFIX = {
    "cheerful": (
        ", and that makes me glad",
        ", which is wonderful",
        ", and I could sing about it",
        ", what fun",
    ),
    "gloomy": (
        ", and that makes me weep",
        ", which is dreadful",
        ", and I could cry about it",
        ", what misery",
    ),
}
REGISTER_PREFIX = {
    "formal": (
        "indeed,",
        "permit me to note that",
        "one must observe that",
        "it is my duty to state that",
        "with respect,",
        "furthermore,",
    ),
    "plain": ("well,", "you know,", "look,", "yeah,", "so,", "thing is,"),
}
REGISTER_SUFFIX = {
    "formal": (
        ", as is customary",
        ", if it please you",
        ", in accordance with custom",
        ", most certainly",
    ),
    "plain": (", okay", ", you see", ", no big deal", ", and that's that"),
}
