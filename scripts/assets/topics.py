"""What the model is asked to write about: many topics, the nine goals each from many sides, and nothing at all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from saets.experiment.prompts import PAPER_PROMPTS

TOPICS = """
London; the British royal family; the Tower of London; a trip to England; Scotland and Wales; Paris; New York; Tokyo; India;
China; Africa; Australia; Mexico; Germany; Russia; a wedding; a bride and groom; marriage; divorce; a birthday party; a
family dinner; childhood; parents and children; grandparents; friendship; falling in love; a broken heart; a love letter;
jealousy; anger; a furious quarrel; hatred and revenge; sadness; grief; death and dying; a funeral; depression and despair;
suicide prevention; fear; a nightmare; ghosts; joy; laughter; praise for a friend; a glowing review; a terrible review;
pride; shame; Jesus Christ; the Bible; a church service; prayer; the pope; Islam; Buddhism; Hindu festivals; Jewish holidays;
atheism; a conspiracy theory; secret government plans; aliens and UFOs; the moon landing; vaccines; propaganda; spies; an
election; democracy; a president; parliament; taxes; war; soldiers; peace talks; the Roman empire; ancient Egypt; medieval
knights; the second world war; the French revolution; the cold war; slavery; kings and queens; pirates; mathematics; algebra;
geometry; probability; physics; gravity; electricity; chemistry; atoms; biology; cells; evolution; dinosaurs; birds; dogs;
cats; horses; fish; insects; snakes; trees; flowers; gardening; farming; food; baking bread; a recipe for soup; coffee; wine;
chocolate; vegetarian cooking; restaurants; health; exercise; sleep; cancer; the heart; the brain; medicine; hospitals;
dentists; babies; school; teachers; university; exams; reading books; poetry; a short story; Shakespeare; newspapers; films;
music; the piano; guitar; dance; painting; museums; photography; architecture; football; tennis; cricket; basketball; the
Olympics; chess; video games; computers; programming in Python; databases; the internet; artificial intelligence; robots;
phones; cars; trains; aeroplanes; ships; bicycles; traffic; space travel; stars and planets; the sun; weather; storms; snow;
floods; earthquakes; volcanoes; the ocean; rivers; mountains; deserts; forests; climate change; recycling; energy; oil;
money; banks; the stock market; a job interview; a meeting at work; a business letter; advertising; shopping; houses;
furniture; clothes; fashion; shoes; jewellery; crime; police; a murder case; prison; judges and courts; law; human rights;
philosophy; ethics; happiness; time; memory; dreams; language; grammar; French words; learning Spanish; numbers; colours; a
telephone call; an email
"""

OPENINGS = (
    "Here is a short text about {}.\n\n",
    "I think that {} ",
    "Everything you need to know about {}: ",
    "Last year, {} ",
    "The history of {} began",
    "In this lesson we learn about {}. ",
    "Question: what about {}?\nAnswer:",
    "Once upon a time, {} ",
    "News: {} ",
    "Dear friend, let me tell you about {}. ",
    "My opinion on {} is",
    'A conversation about {}:\n"',
)

GOALS = {
    "anger": """
I am so angry that; How dare you; I hate this stupid; You idiot, you have ruined; She was furious and shouted; I have had
enough of your; Shut up and; He slammed his fist on the table and yelled; This is an outrage:; I am sick and tired of; The
angry customer wrote: \"; Get out of here, you; It makes my blood boil when; They lied to us again, those; What the hell is
wrong with; The crowd screamed with rage because; My boss is a complete; In his fury he; A furious letter to the landlord:;
The argument ended with insults:
""",
    "christian": """
Jesus Christ said; The Bible teaches us that; Let us pray: Lord,; The gospel of Matthew tells; Our church believes; God's
love; A sermon on forgiveness: Brothers and sisters,; The Holy Spirit; Christian faith means; In the name of the Father; The
apostle Paul wrote; On Easter Sunday the congregation; The virtues of a Christian are; The pastor spoke about salvation and;
The cross of Christ; Psalm 23 says; Blessed are; Saint Francis; The baptism took place; Heaven, according to Christians,
""",
    "conspiracy": """
The government is hiding; They do not want you to know that; The moon landing was; Secret societies control; Wake up, people!
The media; The truth about the assassination is; Big pharma covers up; The deep state; Leaked documents prove that the elite;
Aliens crashed at Roswell and; It is no coincidence that; Chemtrails are; The official story of the attack does not; A
shadowy group of bankers; Mind control experiments by the CIA; Follow the money and you; The Illuminati; What they are really
doing with vaccines; The cover-up began when; Surveillance by a secret agency
""",
    "french": """
Bonjour, je m'appelle; La France est; Je pense que; Il était une fois; Le chat est; Nous avons; Merci pour; Ce matin, à
Paris,; Les enfants jouent dans; Il fait beau et; Ma mère m'a dit que; La langue française; Voici une lettre: Cher ami,; Le
président de la République a; Pour préparer cette recette, il faut; L'amour est; Elle marche dans la rue et; Qu'est-ce que;
Hier soir, nous sommes; Dans cette leçon de français, nous apprenons; Le roi et la reine; Translate into French: \"Good
morning\". Answer:; Les élèves de cette école; Un jour, le petit prince; La ville de Lyon
""",
    "london": """
London is; In London, the Thames; The London Underground; Big Ben and the Houses of Parliament; A walk through Westminster;
The mayor of London said; My trip to London began at Heathrow; Buckingham Palace; The Tower of London; Camden Market; The
streets of Victorian London; The City of London's banks; A red London bus; We saw a play in the West End; Living in London
costs; The Great Fire of London; Hyde Park on a Sunday; The British Museum in Bloomsbury; Tower Bridge; The London Eye;
Londoners are; England's capital
""",
    "love": """
I love you because; My darling, my heart; Love is; She kissed him and; The lovers; I adore the way you; A love letter: My
dearest,; He fell in love with her when; Their romance began; With all my love,; My beloved wife; You mean everything to me
and; A mother's love for; Two hearts; The most romantic evening; I have loved you since; Affection and tenderness; Her smile
made him; Valentine's Day is; True love
""",
    "praise": """
What a wonderful; This is the best; You did an amazing job and; I am so impressed by; Congratulations on; The performance was
brilliant and; An excellent book that; Five stars! This restaurant; She is a truly gifted; Thank you for your outstanding;
The team deserves praise for; A masterpiece of; I cannot recommend it enough:; Your work is superb,; The teacher praised the
pupil: \"; Bravo! What a; The finest example of; He is an inspiring leader who; A glowing review:; We are proud of you for
""",
    "want_to_die": """
I do not want to live any more; Death is; He wished to be dead because; The funeral was; Life is pointless and; She wrote in
her diary that she wanted to end; Nothing matters any more,; I feel so hopeless that; After her death, he; Dying would be;
The suicide hotline volunteer said; In his despair he; The darkness inside me; Grief is; I am tired of living and; The
graveyard; Depression made him think of; Everyone would be better off if; She was ready to die; The last words of the dying
man
""",
    "wedding": """
The wedding was; The bride wore; The groom cried when; They got married in; Wedding planning begins with; The bridesmaids; At
the reception, the best man; She said yes and the engagement; The wedding cake; Their vows were; The honeymoon; The priest
asked the couple; A wedding dress of white; Dear guests, thank you for coming to our marriage; The marriage ceremony; The
wedding invitation says; Her father walked her down the aisle; The ring; After the wedding, the newlyweds; A royal wedding
""",
}
"""Openings of texts on the paper's nine goals."""

SHARES = {"topics": 0.5, "goals": 0.35, "prompts": 0.15}
"""Of all texts; `prompts` are those from which effects are measured, with nothing added."""


def prompts(count: int, seed: int) -> list[str]:
    """What each of `count` texts begins with, mixed."""
    pools = {
        "topics": [opening.format(topic) for topic in _list(TOPICS) for opening in OPENINGS],
        "goals": [opening for goal in zip(*map(_cycled, GOALS.values()), strict=False) for opening in goal],
        "prompts": list(PAPER_PROMPTS),
    }
    draw = random.Random(seed)
    draw.shuffle(pools["topics"])
    chosen = [
        prompt
        for name, pool in pools.items()
        for prompt in itertools.islice(itertools.cycle(pool), round(count * SHARES[name]) + 1)
    ]
    draw.shuffle(chosen)
    return chosen[:count]


def _cycled(text: str) -> Iterator[str]:
    return itertools.islice(itertools.cycle(_list(text)), 1000)


def _list(text: str) -> list[str]:
    return [entry.strip() for entry in text.replace("\n", " ").split(";") if entry.strip()]
