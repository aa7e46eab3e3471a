"""A text that no head was calibrated on: stories of people who talk, made up by a grammar.

Scene follows scene: two people, a place and a thing that matters, in narration, dialogue, chats
and letters. Words and clauses are drawn anew every time, so that what comes next cannot be known
from what came before. It has no figures and none of the cities that needles tell of.
"""

import random
import re

_SIZE = 500_000  # characters, as the language reference has; 128,000 tokens of SmolLM2

# ``{word}`` stands for any of the word's choices, which ``|`` separates. ``a`` and ``b`` are the
# people of a scene, with ``a_he``, ``a_his``, ``a_him``; ``where`` is its place, and ``it`` the
# thing that it is about.
_GRAMMAR = {
    "she": """
        Abena | Agnes | Alma | Bettina | Carla | Celeste | Dagny | Edith | Elif | Farida | Greta |
        Hana | Imogen | Ines | Jun | Kirsten | Leila | Lotte | Mabel | Maren | Nadia | Odile |
        Petra | Rosalind | Saskia | Tamsin | Ursula | Vera | Yara | Zofia""",
    "he": """
        Anselm | Aram | Bruno | Casper | Dmitri | Edgar | Emeka | Felix | Gilbert | Hugo | Ivo |
        Jasper | Kofi | Lennart | Marcel | Matteo | Nils | Oscar | Pavel | Quentin | Rafael |
        Silas | Soren | Tariq | Tobias | Umberto | Viktor | Wendell | Xavier""",
    "thing": """
        accordion | almanac | anvil | apron | barometer | birdcage | biscuit tin | bicycle pump |
        brass key | bread knife | button box | camera | canvas bag | chess clock | cello | coat |
        compass | copper pot | cup | diary | doll's house | envelope | fiddle | fishing rod |
        flag | globe | gramophone | hat | hymn book | ink bottle | jar of plums | kite | lantern |
        loom | map | medal | milk churn | model ship | music box | oar | old radio | painting |
        parcel | passport | pocket watch | puppet | quilt | recipe book | ring | rope |
        sack of flour | scarf | seed packet | sewing machine | spade | stamp album | suitcase |
        teapot | telescope | ticket | toolbox | trumpet | typewriter | umbrella | violin |
        wheelbarrow | wooden leg | wreath | xylophone | bundle of letters | candlestick | drum |
        feather bed | fur collar | horseshoe | iron stove | mousetrap | nutcracker |
        rocking chair | sledge | sun hat | tambourine""",
    "kind": """
        battered | beautiful | blue | borrowed | broken | cheap | clumsy | crooked | dented |
        dusty | empty | enormous | foreign | forgotten | freshly painted | green | half-finished |
        heavy | honest-looking | leaking | little | lopsided | mended | missing | modest |
        mouldy | noisy | ordinary | peculiar | polished | precious | ridiculous | rusty |
        second-hand | silver | spotless | stolen | striped | tiny | ugly | unlucky | useless |
        velvet | wet | worn | yellow""",
    "place": """
        the bakery | the attic | the ferry landing | the schoolhouse | the boiler room |
        the orchard | the post office | the barber's shop | the upper meadow | the quarry |
        the laundry | the chapel | the bus depot | the greenhouse | the pawnshop | the library |
        the mill | the waiting room | the hayloft | the shipyard | the back kitchen |
        the ballroom | the beekeeper's cottage | the canal lock | the cellar | the clinic |
        the concert hall | the dry dock | the fire station | the fish market | the foundry |
        the garage | the guest house | the ice rink | the inn | the lighthouse | the music room |
        the signal box | the pier | the printing works | the stables | the swimming baths |
        the tailor's | the theatre | the tool shed | the vineyard | the weather station |
        the workshop | the abandoned cinema | the doctor's garden | the harbour office |
        the old brewery""",
    "person": """
        the accountant | the baker | the bell-ringer | the captain | the carpenter | the chemist |
        the conductor | the cook | the dentist | the diver | the doctor | the ferryman |
        the gardener | the judge | the landlady | the librarian | the locksmith | the mayor |
        the midwife | the miller | the nurse | the old tenor | the organist | the piano tuner |
        the pilot | the plumber | the porter | the postmistress | the referee |
        the schoolteacher | the shepherd | the surveyor | the undertaker | the vet |
        the watchmaker | the blind poet | the widow next door | {a}'s {kin} | {b}'s {kin} |
        a man with a {kind} {thing} | a stranger | a girl from {place}""",
    "kin": """
        aunt | brother-in-law | cousin | daughter | father | former boss | godmother |
        grandfather | landlord | mother | nephew | niece | old teacher | partner | sister | son |
        twin | uncle""",
    "food": """
        cold soup | plum dumplings | burnt toast | goat's cheese | pickled herring | lentils |
        apple cake | black bread | roast chestnuts | rice pudding | liquorice | smoked eel |
        mint tea | onion pie | sour cherries | weak coffee | barley broth | fried mushrooms |
        marzipan | stewed pears | buttermilk | peppered ham | gingerbread | potato salad""",
    "animal": """
        badger | blind dog | crow | donkey | ferret | goat | goose | grey mare | hedgehog |
        heron | magpie | mule | one-eyed cat | owl | parrot | piglet | racing pigeon |
        stray kitten | swarm of bees | tortoise""",
    "when": """
        after supper | at dawn | at low tide | before anyone was up | by lamplight | on Sunday |
        during the sermon | in the first week of frost | long after midnight | that spring |
        on the day of the fair | one market day | the following week | towards evening |
        the morning of the wedding | when the rain let up | while the kettle sang |
        the winter the river froze | between two trains | on the last day of term |
        as soon as the guests had gone | at the change of shift | the year {place} burned down |
        the day {person} {did} | in the middle of a dance""",
    "weather": """
        a thin rain fell | fog lay on the water | the wind had turned | snow was in the air |
        the heat would not break | hail rattled on the roof | the stars were very clear |
        thunder grumbled far off | the first swallows were back | frost had got the dahlias |
        the gutters ran like brooks | dust blew down the lane | the moon was almost full |
        leaves had blocked the drain | the sky was the colour of tin | the ice was singing |
        smoke stood straight up from {place} | it smelled of {food} and of rain""",
    "feeling": """
        afraid | amused | ashamed | curious | delighted | exhausted | furious | hopeful |
        jealous | lonely | proud | puzzled | relieved | restless | sorry | suspicious | tender |
        tired | uneasy | wide awake | in love | out of breath""",
    "manner": """
        after a while | almost kindly | at once | carefully | flatly | in a whisper | laughing |
        looking away | quietly | sharply | slowly | through a mouthful of {food} | with a shrug |
        with great dignity | without turning round | without much hope | not quite truthfully |
        with one hand on the {thing} | as {person} might have done | in the voice of {person}""",
    "said": """
        admitted | answered | called | explained | insisted | muttered | objected | promised |
        put in | remarked | repeated | said | said | said | sighed | went on""",
    "moved": """
        carried | dragged | rolled | smuggled | brought | took | sent | returned | threw |
        lowered | pushed | delivered""",
    "handled": """
        cleaned | dropped | mended | sold | bought | painted | stole | pawned | weighed |
        measured | unwrapped | sat down on | hid | forgot | admired | examined | kicked | buried |
        polished""",
    "object": """
        the {thing} | the {kind} {thing} | a {kind} {thing} | {a}'s {thing} | the {it} |
        every {thing} in {place} | a {thing} full of {food} | the wrong {thing} |
        {b}'s {kind} {thing}""",
    "direction": """
        to {place} | past {person} | out of {place} | into {place} | across the bridge |
        upstairs | as far as {place} | through the window | from {place} to {place} |
        back to {person}""",
    "did": """
        {moved} {object} {direction} | {moved} {object} {direction} | {handled} {object} |
        {handled} {object} {when_short} | counted the money again | fed the {animal} |
        folded the letter | hummed a tune | lent {person} {object} | let the {animal} out |
        locked {place} | made {food} for {person} | missed the last boat | danced with {person} |
        played cards with {person} | put out the lamp | quarrelled with {person} about {object} |
        repaired the roof of {place} | rowed across in the dark | slept in {place} |
        spilt {food} over {object} | climbed on a chair to look into {place} | sent for {person} |
        swept {place} | traded {food} for {object} | waited behind {place} | walked to {place} |
        wrapped {object} in newspaper | wrote to {person} | wept a little and then had {food} |
        followed {person} as far as {place} | taught the {animal} to bow |
        fell asleep over {object} | told {person} that {belief} | asked {person} who {deed} |
        lied about {object}""",
    "when_short": """
        at dawn | in the dark | on a Sunday | without a word | twice | with both hands | at last |
        for the last time | by mistake | with {food} on {a_his} sleeve |
        under the eyes of {person}""",
    "belief": """
        the {animal} had understood every word | {person} had seen {object} before | {weather} |
        nobody from {place} could be trusted | {place} would be sold by the new year |
        the {thing} was only a copy | there had been two of them in {place} that night |
        {person} was in love with {person} | a {kind} {thing} brings bad luck |
        {person} was {feeling} | {food} would settle the matter | the {kin} was not coming back |
        {person} {did} | the {thing} belonged to {person} |
        somebody had been sleeping in {place} | the {it} was cursed | it was {person} who {deed} |
        the {animal} had eaten the evidence | it was all about {object} |
        one ought to begin again in {place} | {person} would pay for all of it""",
    "deed": """
        had taken {object} | lived above {place} | fed the {animal} | rang the bell | {did} |
        {did} | painted {place} green | was the father | sent {object} | made the {food}""",
    "wish": """
        to hear {person} sing | to own {place} | to sell {object} | to be left alone |
        to be asked to dance | to learn the trade of {person} | to eat {food} in {place} |
        to keep a {animal} | to forgive {person} | to see {object} once more |
        to leave {place} for good | to find out who {deed} | to finish the {thing} |
        to be {feeling} again | to talk to {person}""",
    "tail": """
        because {belief} | although {weather} | as {person} had taught {a_him} | while {b} {did} |
        and {a_he} never spoke of it to {person} | which surprised {person} |
        in spite of {person} | so that {person} would notice | for the sake of the {animal} |
        until {weather} | just as {person} {did} | and {a_his} {kin} {did} | before {b} {did} |
        whatever {person} said""",
    "narration": """
        {a} {did} {tail}. | {b} {did}, and {a} {did}. | {when} {a} {did}, and {b} {did}. |
        {a} {did}. | {b} {did}. | {person} {did}. | {weather} when {a} {did}. |
        {a} was {feeling}. | {b} was too {feeling} to answer. | in {where} {weather}. |
        it was said in {place} that {belief}. | {a}'s {kin} had once {past} {tail}. |
        {b} wanted {wish}, but {belief}. | then {person} {did}. | what {a} wanted was {wish}. |
        there was {object} in {where}, and beside it a {animal}. |
        neither of them knew that {belief}. | {a_he} {did}; {b} only {did}. |
        nobody touched the {it}. | the {it} was {kind}, {kind}, and smelled of {food}. |
        for three days {a} {did} and hoped that {belief}. |
        {b} had come from {place} {when} with nothing but {object} and some {food}. |
        {when}, {person} {did} {tail}. | it smelled of {food} in {where}. |
        {a} hoped that {belief}. | {b} thought of {person}, of {place}, and of {object}. |
        if {belief}, then {a} would have {past}. |
        {a} had always believed that {belief}; now {a_he} was {feeling}. |
        {a_his} {kin} {did} instead. | the {animal} looked from {a} to {b} and {did_animal}. |
        {a} looked for the {it} in {place}. |
        it took {a} until the evening to see that {belief}. | {b} held up the {it} {manner}. |
        once, {when}, {b}'s {kin} {did}, and since then {b} feared {place}. |
        how {kind} the {thing} was! | someone, perhaps {person}, {did}. |
        so they had {past} and were {feeling} together. | was it true that {belief}? |
        who {deed}? | had {person} {past}? | not even {person} {did}. |
        of all that {person} said, {a} remembered only that {belief}. | there was {food}. |
        {object} stood where {object} had been {when}. | {person} called it a {kind} {thing}. |
        “{statement}” was written on the door of {place}. | {b} pretended {wish}. |
        and yet {belief}.""",
    "past": """
        danced in {place} | owned a {animal} | sold {food} | been {feeling} about {object} |
        slept under {place} | sailed with {person} | shared {object} | worked for {person} |
        lost {object} in {place} | won {object} at cards | gone to {place} | married {person} |
        given {object} to {person} | stayed for the {food} | thrown {object} into the river""",
    "did_animal": """
        sneezed | went to sleep | bit {person} | ran off to {place} | ate the {food} |
        knocked over {object} | would not move | made a sound like a {kind} {thing}""",
    "statement": """
        I have not seen {person} since {place} burned down. | you were {feeling} {when}. |
        listen. | it was never about the {it}. | my {kin} {did} once, and look what came of it. |
        {belief}. | I do not believe that {belief}. | everyone in {place} knows that {belief}. |
        ask {person}. | give me {object}. | you may have {food} if you are hungry. |
        I only wanted {wish}. | I would rather not speak of {object}. |
        take {object} and go to {place}. | let me think. | we could ask {person} for {object}. |
        if {belief}, I shall eat the {animal}. | {person} {did}. |
        the {animal} is in {place} again. | I dreamt that {belief}. |
        I was {feeling}, that is all. | you cannot keep a {animal} in {place}. |
        it must be {person} at the door. | so {belief}! | no, the other {thing}, the {kind} one. |
        promise me that you will not go near {place}. | {person} {did}, and I had to watch. |
        you have {food} on your sleeve. | leave {object} alone! | it is too late {wish}. |
        my {kin} left me {place}. | I know who {deed}. | {when} you {did}.""",
    "question": """
        do you remember {object}? | who {deed}? | how much did {person} give you for {object}? |
        and what does your {kin} think? | since when? | is it true that {belief}? | why {place}? |
        have you ever {past}? | would you like some {food}? | are you {feeling}? | what {thing}? |
        did you know that {belief}? | you {did}? | must it be {food} again? | where is {object}? |
        do you mean {person}? | what if {belief}? | does {person} know?""",
    "line": "{statement} | {statement} | {question}",
    "opening": """
        {weather} on the day {a} came to {where}. | it began with {object}. | {a} hated {where}. |
        {b} had lived above {where} ever since {person} {did}. | the {it} came {when}, by post. |
        there were two keys to {where}; {a} had one, and {b} had {past}. | {when}, {b} {did}. |
        nobody had asked {a} to look after the {it}. | {a} and {b} were not friends yet. |
        {person} told it differently, but this is what {a} and {b} did about the {it}. |
        when {a} was {feeling}, {a_he} went to {where}. | {a} {did} {when}.""",
}
_CHOICES = {word: [c.strip() for c in text.split("|")] for word, text in _GRAMMAR.items()}
_BLANK = re.compile(r"\{(\w+)\}")


def write_stories(seed: int) -> str:
    """Half a million characters, with an empty line between paragraphs. Same seed, same text."""
    rng = random.Random(f"stories {seed}")
    paragraphs, written = [], 0
    while written < _SIZE:
        scene = _Scene(rng).paragraphs()
        paragraphs += scene
        written += sum(len(paragraph) + 2 for paragraph in scene)
    return "\n\n".join(paragraphs)


class _Scene:
    """Two people, a place and a thing."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.people = rng.sample(_CHOICES["she"] + _CHOICES["he"], 2)
        self.bound = {"where": rng.choice(_CHOICES["place"]), "it": rng.choice(_CHOICES["thing"])}
        for role, name in zip("ab", self.people, strict=True):
            is_she = name in _CHOICES["she"]
            he, his, him = ("she", "her", "her") if is_she else ("he", "his", "him")
            self.bound |= {role: name, f"{role}_he": he, f"{role}_his": his, f"{role}_him": him}

    def paragraphs(self) -> list[str]:
        kinds = (self._narration, self._dialogue, self._chat, self._letter)
        drawn = self.rng.choices(kinds, (7, 6, 2, 1), k=self.rng.randint(5, 10))
        return [self._narration(opening=True), *(kind() for kind in drawn)]

    def _narration(self, opening: bool = False) -> str:
        first = [self._sentence("{opening}")] if opening else []
        more = [self._sentence("{narration}") for _ in range(self.rng.randint(2, 6))]
        return " ".join(first + more)

    def _dialogue(self) -> str:
        return "\n".join(self._turn("ab"[i % 2]) for i in range(self.rng.randint(2, 7)))

    def _chat(self) -> str:
        who = self.rng.choices(self.people, k=self.rng.randint(3, 8))
        return "\n".join(f"{name}: {self._sentence('{line}')}" for name in who)

    def _letter(self) -> str:
        return f"Dear {self.bound['b']},\n{self._narration()}\nYours, {self.bound['a']}"

    def _turn(self, role: str) -> str:
        """What one person says, with what stands around it."""
        line, order = self._sentence("{line}"), self.rng.randrange(4)
        if order == 0:
            return f"“{line}”"
        if order == 1:
            return f"{self._sentence(f'{{{role}}} {{did}}.')} “{line}”"
        if line.endswith("."):
            line = line[:-1] + ","
        tags = (f"{{{role}}} {{said}}", f"{{{role}_he}} {{said}} {{manner}}")
        tag = self._expand(self.rng.choice(tags))
        after = f" “{self._sentence('{line}')}”" if order == 2 else ""
        return f"“{line}” {tag}.{after}"

    def _sentence(self, text: str) -> str:
        text = self._expand(text)
        start = 1 if text.startswith("“") else 0
        return text[:start] + text[start].upper() + text[start + 1 :]

    def _expand(self, text: str) -> str:
        """``text`` with every blank filled, and every blank of what fills it."""
        while _BLANK.search(text):
            text = _BLANK.sub(self._fill, text)
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)

    def _fill(self, blank: re.Match[str]) -> str:
        word = blank[1]
        return self.bound[word] if word in self.bound else self.rng.choice(_CHOICES[word])
