"""The grammar of the little language that `embedded:tiny` speaks.

Owns `Random` (its own generator, so that every Python draws the same text) and the kinds of paragraph. `paragraph(rng)`
gives one paragraph. Knows nothing of files, tokens or the quickstart's task: the record form `... =>` never occurs here.
"""

from tiny_words import (ANIMALS, BOYS, BROKEN, COLOURS, COUNTED, DAYS, FAMILY, FEELINGS, FOODS, GIRLS, JOBS, LOST, MACHINES,
                        NUMBERS, OBJECTS_AT_HOME, OPPOSITES, PLACES, PROVERBS, ROOMS, SAVINGS, SEASONS, SIZES, SOUPS,
                        SOURCES, TOOLS, WEATHER)


class Random:
    """SplitMix64 (Steele, Lea and Flood 2014): 64 bits of state, the same numbers in every version of Python."""

    MASK = (1 << 64) - 1

    def __init__(self, seed):
        self.state = seed & self.MASK

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & self.MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & self.MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & self.MASK
        return z ^ (z >> 31)

    def below(self, n):
        """An integer in 0..n; the bias of the product is under n / 2^64."""
        return (self.next() * n) >> 64

    def between(self, low, high):
        return low + self.below(high - low + 1)

    def pick(self, items):
        return items[self.below(len(items))]

    def some(self, items, count):
        """`count` different items, in drawn order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]

    def maybe(self, text):
        return text if self.below(2) else ""

    def shuffle(self, items):
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]


def a(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def listed(items):
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def cap(text):
    return text[0].upper() + text[1:]


def count_of(n, noun):
    return f"{n} {noun[:-2] if n == 1 and noun == 'boxes' else noun[:-1] if n == 1 else noun}"


def hours(n):
    return f"{n} hour" if n == 1 else f"{n} hours"


def someone(rng):
    """A name with its pronouns: (name, she, her (of), her (to))."""
    if rng.below(2):
        return rng.pick(GIRLS), "she", "her", "her"
    return rng.pick(BOYS), "he", "his", "him"


def opening(rng):
    day, season = rng.pick(DAYS), rng.pick(SEASONS)
    word, effect = rng.pick(WEATHER)
    return rng.pick([
        f"On {day} it was {word} and {effect}.", f"It was a {word} day in {season}, and {effect}.",
        f"One {word} morning {effect}.",
        f"It was {day}. {cap(effect)}.", f"In {season} the days are often {word}. That {day} {effect}."])


def story_lost(rng):
    name, she, her, to = someone(rng)
    thing, colour = rng.pick(LOST), rng.pick(COLOURS)
    place, at, seen = rng.pick(PLACES)
    friend = rng.pick(FAMILY)
    spots = rng.some(OBJECTS_AT_HOME, 2)
    animal = rng.pick(ANIMALS)[0]
    advice = rng.pick(["No, but I will help you look", "Perhaps you left it at the " + place, "Think of where you were last"])
    end = rng.pick([f"It was under the {spots[1]}.", f"The {animal} had it all the time.",
                    f"It was {at} the {place}, next to {rng.pick(seen)}.",
                    f"It was in {her} own pocket, and everyone laughed."])
    return (f"{opening(rng)} {name} could not find {her} {colour} {thing}. {cap(she)} looked under the {spots[0]} and behind "
            f"the door, "
            f"but it was not there. \"Have you seen my {thing}?\" {she} asked {her} {friend}. "
            f"\"{advice},\" said the {friend}. {end} {name} was {rng.pick(['glad', 'happy', 'proud and tired'])} "
            f"and thanked {her} {friend}.")


def story_repair(rng):
    name, she, her, to = someone(rng)
    thing, tool = rng.pick(BROKEN)
    place, at, seen = rng.pick(PLACES)
    job, feeling, food = rng.pick(JOBS), rng.pick(FEELINGS), rng.pick(FOODS)
    return (f"{opening(rng)} {name} walked to the {place} and saw {rng.pick(seen)}. There {she} met a {feeling} {job}. \"My "
            f"{thing} is broken,\" said the "
            f"{job}. \"I need a {tool}.\" {name} had a {tool} in {her} bag. They worked for {hours(rng.between(1, 6))}, "
            f"and then the {thing} was as good as new. The {job} gave {to} some {food}. {rng.maybe(rng.pick(PROVERBS))}").rstrip()


def story_walk(rng):
    name, she, her, to = someone(rng)
    places = rng.some(PLACES, 2)
    animal, _, eats, sound, young = rng.pick(ANIMALS)
    foods = rng.some(FOODS, 3)
    feelings = rng.some(FEELINGS, 2)
    (first, at1, seen1), (second, at2, seen2) = places
    return (f"{name} packed {listed(foods)} and set out for the {first}. {opening(rng)} {cap(at1)} the {first} {she} saw "
            f"{listed(rng.some(seen1, 2))}. "
            f"{cap(a(animal))} came close and {rng.pick(['looked at ' + to, 'ate from ' + her + ' hand', 'ran away again'])}. "
            f"{rng.maybe(f'Its {young} was not far away. ')}In the evening {she} came to the {second}, where there was "
            f"{rng.pick(['a fire', 'music', 'a warm room', 'an old friend'])}. "
            f"{name} was {feelings[0]} but also {feelings[1]}, and slept well.")


def story_gift(rng):
    (giver, she, her, to), friend = someone(rng), rng.pick(FAMILY)
    size, colour, thing = rng.pick(SIZES), rng.pick(COLOURS), rng.pick([t[0] for t in TOOLS] + LOST)
    place, at, seen = rng.pick(PLACES)
    coins = rng.between(2, 9)
    return (f"{giver} wanted to give {her} {friend} a {size} {colour} {thing}. It cost {coins} coins, and {she} had only "
            f"{coins - 1}. So {she} "
            f"{rng.pick(['sold', 'carried', 'washed', 'counted'])} {rng.pick(FOODS)} for the {rng.pick(JOBS)} {at} the "
            f"{place} until {she} had one more coin. "
            f"On {rng.pick(DAYS)} the {friend} opened the box. \"A {thing}! It is just what I need,\" said the {friend}. "
            f"{rng.pick(PROVERBS)}")


def dialogue(rng):
    (one, she1, her1, to1), (two, she2, her2, to2) = someone(rng), someone(rng)
    machine, does = rng.pick(MACHINES)
    room, (tool, use, made) = rng.pick(ROOMS), rng.pick(TOOLS)
    source, origin, strong, weak = rng.pick(SOURCES)
    exchanges = rng.some([
        (f"What does the {machine} do?", f"It {does}."), (f"Where is the {tool}?", f"It is in the {room}."),
        (f"What is a {tool} for?", f"You can {use} with it."),
        (f"Is the {machine} in the {room}?", f"No, it is in the {rng.pick([r for r in ROOMS if r != room])}."),
        (f"Why is the {source} so strong today?", f"Because it is best {strong}."),
        (f"Who turned off the {machine}?", "I did, to save energy."),
        ("What shall we eat?", f"Let us make {rng.pick(SOUPS)[0]} soup."),
        ("When will you be home?", f"On {rng.pick(DAYS)}, I think."),
        ("How is the weather?", f"It is {rng.pick(WEATHER)[0]} and {rng.pick(WEATHER)[0]}."),
        (f"What is a {tool} made of?", f"It is made of {made}.")], rng.between(2, 4))
    lines = [f"\"{question}\" asked {one}. \"{answer}\" said {two}." for question, answer in exchanges]
    return " ".join(lines).replace(".\" said", ",\" said")


def animal_facts(rng):
    name, home, eats, sound, young = rng.pick(ANIMALS)
    other = rng.pick([x for x in ANIMALS if x[0] != name])
    facts = rng.some([
        f"It lives {home}.", f"It eats {eats}.", f"A young {name} is called {a(young)}.",
        f"It {sound} when it is {rng.pick(FEELINGS)}.", f"It is not like {a(other[0])}, which eats {other[2]}.",
        f"In {rng.pick(SEASONS)} you see it more often.", f"Many {rng.pick(COLOURS)} ones are seen here."],
        rng.between(3, 5))
    return f"{cap(a(name))} is an animal. " + " ".join(facts)


def thing_facts(rng):
    tool, use, made = rng.pick(TOOLS)
    machine, does = rng.pick(MACHINES)
    word, opposite = rng.pick(OPPOSITES)
    return rng.pick([
        f"A {tool} is a tool. It is made of {made}. People use it to {use}. A {rng.pick(JOBS)} often has one in the "
        f"{rng.pick(ROOMS)}. It costs {rng.between(2, 9)} coins.",
        f"{cap(a(machine))} is a machine that {does}. It needs power to run. Most people keep it in the {rng.pick(ROOMS)} or "
        f"in the {rng.pick(ROOMS)}. When it is not needed, turn it off.",
        f"The opposite of {word} is {opposite}. If the {rng.pick(LOST)} is not {word}, it may be {opposite}. The "
        f"{rng.pick(LOST)} of {someone(rng)[0]} is {word}, and the one of {someone(rng)[0]} is {opposite}.",
    ])


def questions(rng):
    animal, home, eats, sound, young = rng.pick(ANIMALS)
    machine, does = rng.pick(MACHINES)
    tool, use, made = rng.pick(TOOLS)
    word, opposite = rng.pick(OPPOSITES)
    source, origin, strong, weak = rng.pick(SOURCES)
    x, y = rng.between(1, 9), rng.between(1, 9)
    pairs = rng.some([
        (f"what does {a(animal)} eat?", f"{a(animal)} eats {eats}."), (f"where does {a(animal)} live?", f"it lives {home}."),
        (f"what is a young {animal} called?", f"it is called {a(young)}."), (f"what does {a(machine)} do?", f"it {does}."),
        (f"what is a {tool} made of?", f"it is made of {made}."), (f"what is the opposite of {word}?", f"it is {opposite}."),
        (f"where does a {source} take its energy from?", f"from {origin}."),
        (f"what is {x} times {y}?", f"{x} times {y} is {x * y}."), (f"what is {x} plus {y}?", f"{x} plus {y} is {x + y}."),
        (f"when is a {source} weak?", f"it is weak {weak}.")], rng.between(2, 4))
    return " ".join(f"Question: {q} Answer: {answer}" for q, answer in pairs)


def counting(rng):
    (name, she, her, to), thing = someone(rng), rng.pick(COUNTED)
    x, y = rng.between(2, 9), rng.between(2, 9)
    more, less = f"{x} plus {y} is {x + y}", f"{x + y} minus {x} is {y}"
    n = rng.between(1, 9)
    return rng.pick([
        f"{name} has {count_of(x, thing)}. {cap(she)} gets {y} more. {cap(more)}, so now {she} has {count_of(x + y, thing)}. "
        f"Then {she} gives {x} away. {cap(less)}, so {y} are left.",
        f"There are {count_of(x, 'boxes')} on the {rng.pick(OBJECTS_AT_HOME)}. In each box {name} puts {count_of(y, thing)}. "
        f"{x} times {y} is {x * y}, so there are {count_of(x * y, thing)} in all.",
        f"{cap(NUMBERS[x])} plus {NUMBERS[y]} is {NUMBERS[x + y]}. {cap(NUMBERS[x + y])} minus {NUMBERS[y]} is {NUMBERS[x]}. "
        f"{name} wrote it on the wall with a {rng.pick(COLOURS)} pencil.",
        " ".join(f"{m} times {n} is {m * n}." for m in sorted(rng.some(range(1, 10), 5))) +
        f" This is the row of {n}, and {name} knows it well.",
        " ".join(f"{n} times {m} is {n * m}." for m in rng.some(range(1, 10), 5)) +
        f" {name} learned this at school on {rng.pick(DAYS)}.",
    ])


def lists(rng):
    (name, she, her, to), place = someone(rng), rng.pick(PLACES)
    foods, tools = rng.some(FOODS, rng.between(3, 5)), [a(t[0]) for t in rng.some(TOOLS, rng.between(2, 4))]
    soup, roots = rng.pick(SOUPS)
    n = rng.between(2, 4)
    return rng.pick([
        f"Things to buy on {rng.pick(DAYS)}: {listed(foods)}. {name} wrote the list, and {her} {rng.pick(FAMILY)} went to the "
        f"market with {rng.between(2, 20)} coins.",
        f"For the {rng.pick(JOBS)} {name} brought {listed(tools)}. That is {NUMBERS[len(tools)]} tools in all. They lay on "
        f"the {rng.pick(OBJECTS_AT_HOME)} in the {rng.pick(ROOMS)}.",
        f"To make {soup} soup, first wash {count_of(n + 2, 'cups')} of {roots}. Then cut them with a knife and put them in a "
        f"pot with water. Add {listed(rng.some(['salt', 'butter', 'onions', 'milk', 'beans', 'rice'], 2))}. "
        f"Cook it for {hours(rng.between(1, 3))} and share it with your {rng.pick(FAMILY)}.",
        f"{name} goes {place[1]} the {place[0]} on {listed(rng.some(DAYS, 3))}. On other days {she} is at home in the "
        f"{rng.pick(ROOMS)}.",
    ])


def energy_use(rng):
    (name, she, her, to), (machine, does), room = someone(rng), rng.pick(MACHINES), rng.pick(ROOMS)
    power, time = rng.between(1, 9), rng.between(1, 9)
    used = power * time
    much = "That is little." if used < 10 else "That is a fair amount." if used < 30 else "That is a lot."
    return rng.pick([
        f"{cap(a(machine))} {does}. With a power of {power} kW it uses {used} kWh in {hours(time)}, because {power} times "
        f"{time} is {used}. {much}",
        f"{name} ran the {machine} in the {room} for {hours(time)}. Its power is {power} kW, so it used {used} kWh of energy. "
        f"{much} {rng.maybe(cap(she) + ' wrote it in the book.')}".rstrip(),
        f"How much energy does the {machine} use? Its power is {power} kW and it runs for {hours(time)}. {power} times {time} "
        f"is {used}, so the answer is {used} kWh. {much}",
        f"Energy is power times hours. {power} kW for {hours(time)} is {used} kWh. {much} The {machine} of {name} stands in "
        f"the {room}.",
    ])


def energy_story(rng):
    (name, she, her, to), (source, origin, strong, weak) = someone(rng), rng.pick(SOURCES)
    machine, does = rng.pick(MACHINES)
    act, why = rng.pick(SAVINGS)
    place, at, _ = rng.pick(PLACES)
    return rng.pick([
        f"A {source} takes its energy from {origin}. It gives much power {strong}, but little {weak}. The one {at} the "
        f"{place} runs {a(machine)}, which {does}. {opening(rng)}",
        f"{opening(rng)} {name} {act}, because {why}. \"That saves energy,\" said {her} {rng.pick(FAMILY)}. "
        f"{rng.pick(PROVERBS)} In the {rng.pick(ROOMS)} the {machine} was off as well.",
        f"{name} the {rng.pick(JOBS)} built a {source} {at} the {place}. {cap(strong)} it gave power for the {machine}. "
        f"{cap(weak)} the {machine} had to wait. {opening(rng)} {name} was {rng.pick(FEELINGS)}.",
        f"The battery was {rng.pick(['full', 'half full', 'almost empty'])}. {opening(rng)} The {source} "
        f"{rng.pick(['stood still', 'worked hard', 'was slow'])}, and {name} {act}, for {why}.",
    ])


def repeating(rng):
    """Words without sense, said twice: what teaches a small model to look back and copy."""
    names = [someone(rng)[0] for _ in range(2)]
    words = [row[0] for row in TOOLS + MACHINES + ANIMALS] + FOODS + ROOMS + COLOURS
    said = listed(rng.some(words, rng.between(3, 7)))
    return rng.pick([
        f"{names[0]} and {names[1]} play a game of words. {names[0]} says: {said}. {names[1]} says the same: {said}. Well "
        f"done, {names[1]}!",
        f"The words on the wall are {said}. {names[0]} reads them to {names[1]}: {said}. Then it is the turn of {names[1]}.",
        f"\"{cap(said)},\" said {names[0]}. \"{cap(said)},\" said {names[1]}. \"That is what I said,\" said {names[0]}.",
    ])


def looking_up(rng):
    """Small facts that hold in this paragraph alone, then questions about them."""
    people, rooms = rng.some(GIRLS + BOYS, 3), rng.some(ROOMS, 3)
    things = rng.some([m[0] for m in MACHINES] + [t[0] for t in TOOLS], 3)
    amounts = [rng.between(1, 9) for _ in range(3)]
    i, j = rng.some(range(3), 2)
    return rng.pick([
        " ".join(f"The {t} is in the {r}." for t, r in zip(things, rooms)) +
        f" Where is the {things[i]}? In the {rooms[i]}. Where is the {things[j]}? In the {rooms[j]}.",
        " ".join(f"{p} has the {t}." for p, t in zip(people, things)) +
        f" Who has the {things[i]}? {people[i]} has the {things[i]}. What does {people[j]} have? The {things[j]}.",
        " ".join(f"{p}, {t}: {count_of(n, 'coins')}." for p, t, n in zip(people, things, amounts)) +
        f" How much did {people[i]} pay? {people[i]} paid {count_of(amounts[i], 'coins')} for the {things[i]}. And "
        f"{people[j]}? {people[j]} paid {count_of(amounts[j], 'coins')} for the {things[j]}.",
        f"{people[0]} is in the {rooms[0]} with {people[1]}, and {people[2]} is in the {rooms[1]}. Who is with {people[1]}? "
        f"It is {people[0]}. Who is in the {rooms[1]}? It is {people[2]}.",
    ])


# Each kind with its share of the paragraphs.
KINDS = [(story_lost, 4), (story_repair, 4), (story_walk, 4), (story_gift, 3), (dialogue, 5), (animal_facts, 3),
         (thing_facts, 3), (questions, 4), (counting, 7), (lists, 3), (energy_use, 8), (energy_story, 4), (repeating, 5),
         (looking_up, 7)]
WHEEL = [kind for kind, share in KINDS for _ in range(share)]


def paragraph(rng):
    """One paragraph of the little language."""
    return " ".join(rng.pick(WHEEL)(rng).split())
