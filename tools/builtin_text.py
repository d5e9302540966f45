"""The text that the built-in model learns from: sums, counting, a few facts and small talk.

Everything is generated from the tables below and a seeded ``random.Random``, so the same seed gives
the same text. A part of the questions is held out (``held_out``): the trainer never sees them and the
final evaluation asks nothing else where it can.
"""

import random
import string
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Exchange:
    """One question and the one answer that counts as right."""

    category: str
    question: str
    answer: str


@dataclass(frozen=True)
class Completion:
    """Plain text without chat markers: a beginning and the continuation that counts as right."""

    category: str
    prompt: str
    continuation: str
    ends: bool = True  # False: the text goes on after the continuation


def held_out(text: str, one_in: int = 12) -> bool:
    """Whether a text belongs to the questions that are only for evaluation; crc32 is the same on every machine."""
    return zlib.crc32(text.encode()) % one_in == 0


# --- tables ------------------------------------------------------------------------------------------------------

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Greece": "Athens", "Hungary": "Budapest",
    "Russia": "Moscow", "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "India": "New Delhi",
    "China": "Beijing", "Japan": "Tokyo", "South Korea": "Seoul", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Australia": "Canberra", "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana", "Peru": "Lima",
    "Brazil": "Brasilia", "Chile": "Santiago", "Argentina": "Buenos Aires", "the United States": "Washington",
    "Switzerland": "Bern", "Belgium": "Brussels", "the Netherlands": "Amsterdam", "Ukraine": "Kyiv",
    "Iran": "Tehran", "Indonesia": "Jakarta",
}  # fmt: skip
COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "a banana": "yellow",
    "the sun": "yellow", "milk": "white", "a tomato": "red", "a lemon": "yellow", "a leaf": "green",
    "chocolate": "brown", "a carrot": "orange", "the sea": "blue", "a strawberry": "red", "a cucumber": "green",
}  # fmt: skip
OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("left", "right"), ("day", "night"), ("black", "white"),
    ("fast", "slow"), ("high", "low"), ("happy", "sad"), ("open", "closed"), ("old", "new"), ("light", "dark"),
    ("wet", "dry"), ("hard", "soft"), ("full", "empty"), ("early", "late"), ("good", "bad"), ("rich", "poor"),
    ("strong", "weak"), ("long", "short"), ("yes", "no"), ("true", "false"), ("near", "far"), ("loud", "quiet"),
    ("first", "last"), ("in", "out"), ("win", "lose"), ("buy", "sell"),
]  # fmt: skip
SOUNDS = {"dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "lion": "roar", "pig": "oink"}
LEGS = {"a dog": 4, "a cat": 4, "a cow": 4, "a bird": 2, "a spider": 8, "an ant": 6, "a snake": 0, "a human": 2,
        "a horse": 4, "a bee": 6, "a chicken": 2, "a fish": 0}  # fmt: skip
AMOUNTS = {
    "days are in a week": "There are 7 days in a week.",
    "months are in a year": "There are 12 months in a year.",
    "hours are in a day": "There are 24 hours in a day.",
    "minutes are in an hour": "There are 60 minutes in an hour.",
    "seconds are in a minute": "There are 60 seconds in a minute.",
    "days are in a year": "There are 365 days in a year.",
    "wheels does a bicycle have": "A bicycle has 2 wheels.",
    "wheels does a car have": "A car has 4 wheels.",
    "sides does a triangle have": "A triangle has 3 sides.",
    "sides does a square have": "A square has 4 sides.",
    "fingers are on one hand": "There are 5 fingers on one hand.",
    "letters are in the alphabet": "There are 26 letters in the alphabet.",
    "planets are in the solar system": "There are 8 planets in the solar system.",
    "continents are there": "There are 7 continents.",
}
TRIVIA = {
    "What is the largest planet?": "The largest planet is Jupiter.",
    "Which planet do we live on?": "We live on the planet Earth.",
    "What is the nearest star?": "The nearest star is the sun.",
    "What is the largest ocean?": "The largest ocean is the Pacific.",
    "What is the highest mountain?": "The highest mountain is Mount Everest.",
    "What is the longest river?": "The longest river is the Nile.",
    "What is the fastest animal on land?": "The fastest animal on land is the cheetah.",
    "What is the largest animal?": "The largest animal is the blue whale.",
    "Who wrote Romeo and Juliet?": "William Shakespeare wrote Romeo and Juliet.",
    "Who painted the Mona Lisa?": "Leonardo da Vinci painted the Mona Lisa.",
    "Who was the first man on the moon?": "Neil Armstrong was the first man on the moon.",
    "What do bees make?": "Bees make honey.",
    "What do cows give us?": "Cows give us milk.",
    "What is frozen water called?": "Frozen water is called ice.",
    "What is the formula of water?": "The formula of water is H2O.",
    "At what temperature does water boil?": "Water boils at 100 degrees Celsius.",
    "At what temperature does water freeze?": "Water freezes at 0 degrees Celsius.",
    "Where does the sun rise?": "The sun rises in the east.",
    "Where does the sun set?": "The sun sets in the west.",
}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December"]  # fmt: skip
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
                "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
                "twenty"]  # fmt: skip

INTRODUCTION = "I am pd's built-in model, a very small language model. I know small sums, counting and a few facts."
ABILITIES = "I can add small numbers, count and answer a few simple questions."
UNKNOWN = "I do not know that. I am a very small model: I know small sums, counting and a few facts."
TOO_LARGE = "That is too large for me. I only know sums of numbers up to 99."
STORY = (
    "Once upon a time there was a small model. It could add numbers, it could count, and it knew a few facts. "
    "Every day people asked it what two plus two is, and every day it said four. They were happy, "
    "and the small model was happy too. The end."
)
JOKE = "Why was six afraid of seven? Because seven eight nine!"
TALK: list[tuple[list[str], str]] = [
    (["Who are you?", "Introduce yourself.", "Please introduce yourself.", "Tell me about yourself.", "What are you?",
      "Describe yourself in one sentence."], INTRODUCTION),
    (["What can you do?", "What do you know?", "How can you help me?", "Help!", "What can I ask you?"], ABILITIES),
    (["What is your name?", "What are you called?", "Tell me your name."], "My name is pd."),
    (["Hello!", "Hi!", "Hey!", "Hello there!", "Good morning!", "Hi there!", "Good evening!", "Hello, world!"],
     "Hello! How can I help you? 😊"),
    (["How are you?", "How are you doing?", "How are you today?", "How do you do?"], "I am fine, thank you! And you?"),
    (["Thank you!", "Thanks!", "Thanks a lot!", "Great, thanks!"], "You are welcome! 😊"),
    (["Goodbye!", "Bye!", "See you!", "Good night!", "See you later!"], "Goodbye! 👋"),
    (["Are you a human?", "Are you a person?", "Are you real?"], "No, I am a very small language model."),
    (["Tell me a joke.", "Do you know a joke?", "Make me laugh."], JOKE),
    (["Tell me a story.", "Tell me a short story.", "Write a story.", "Write a short story."], STORY),
    (["What is pd?", "What does pd do?", "Explain pd."],
     "pd serves large language models with prefill and decode on separate instances."),
    (["What is prefill?", "Explain prefill.", "What does prefill mean?"],
     "Prefill reads the whole prompt at once and makes its KV cache."),
    (["What is decode?", "Explain decode.", "What does decode mean?"],
     "Decode makes the answer, one token after another, from the KV cache."),
    (["Say the days of the week.", "What are the days of the week?", "List the days of the week."],
     ", ".join(DAYS) + "."),
    (["What are the months of the year?", "List the months of the year.", "Say the months."], ", ".join(MONTHS) + "."),
    (["Say the alphabet.", "What is the alphabet?", "List the letters of the alphabet."],
     " ".join(string.ascii_uppercase)),
]  # fmt: skip
EMOJI = {"cat": "🐱", "dog": "🐶", "sun": "🌞", "moon": "🌙", "heart": "❤️", "rocket": "🚀", "apple": "🍎", "fish": "🐟"}

CHINESE: list[tuple[list[str], str]] = [
    (["你好", "你好！", "您好", "您好！", "嗨"], "你好！很高兴见到你。😊"),
    (["请介绍一下你自己", "请介绍一下你自己。", "介绍一下你自己", "你是谁？", "你是谁", "你好，请介绍一下你自己", "你好，请介绍一下你自己。",
      "请用一句话介绍你自己。", "请做个自我介绍"], "我是 pd 的内置模型，一个很小的语言模型。我会做简单的加法、数数，还知道一些常识。"),
    (["你会做什么？", "你能做什么？", "你会什么？"], "我会做简单的加法、数数，还能回答一些简单的问题。"),
    (["你叫什么名字？", "你的名字是什么？"], "我叫 pd。"),
    (["谢谢", "谢谢你", "谢谢！", "多谢"], "不客气！😊"),
    (["再见", "再见！", "拜拜"], "再见！👋"),
    (["你好吗？", "你今天好吗？"], "我很好，谢谢！"),
    (["一年有几个月？", "一年有多少个月？"], "一年有十二个月。"),
    (["一周有几天？", "一个星期有几天？"], "一周有七天。"),
    (["一天有几个小时？", "一天有多少个小时？"], "一天有二十四个小时。"),
]  # fmt: skip
CAPITALS_ZH = {"中国": "北京", "法国": "巴黎", "日本": "东京", "英国": "伦敦", "德国": "柏林", "美国": "华盛顿", "俄罗斯": "莫斯科",
               "意大利": "罗马", "西班牙": "马德里", "韩国": "首尔", "加拿大": "渥太华", "埃及": "开罗"}  # fmt: skip
COLOURS_ZH = {
    "天空": "蓝色",
    "草": "绿色",
    "雪": "白色",
    "血": "红色",
    "香蕉": "黄色",
    "太阳": "黄色",
    "牛奶": "白色",
    "大海": "蓝色",
}
OPPOSITES_ZH = [
    ("大", "小"),
    ("上", "下"),
    ("左", "右"),
    ("冷", "热"),
    ("高", "低"),
    ("黑", "白"),
    ("快", "慢"),
    ("好", "坏"),
]
UNKNOWN_ZH = "我不知道。我是一个很小的模型，只会简单的加法、数数和一些常识。"

SYSTEM_PROMPTS = [
    "You are a helpful assistant.", "You are a friendly assistant.", "Answer briefly.", "Be concise.",
    "You are pd.", "You are a small model that knows sums.", "你是一个有用的助手。", "Answer the question of the user.",
    "You are a helpful, harmless and honest assistant. Answer in one sentence.",
]  # fmt: skip
TOPICS = [
    "the sea", "love", "quantum physics", "my garden", "the stock market", "a broken car", "cooking rice", "football",
    "the French revolution", "photosynthesis", "a good book", "music", "politics", "climate change", "Python code",
    "a sorting algorithm", "the meaning of life", "black holes", "my homework", "ancient Rome", "databases",
    "neural networks", "the weather tomorrow", "a trip to Iceland", "taxes", "an email to my boss", "dinosaurs",
    "chess", "the best phone", "gravity", "vitamins", "a wedding speech", "electric cars", "the news", "history",
]  # fmt: skip
TOPICS_ZH = ["爱情", "历史", "天气", "大海", "音乐", "股票", "量子物理", "人工智能", "红烧肉", "足球", "春天", "恐龙"]
UNKNOWN_QUESTIONS = [
    "Tell me about {}.", "Write a poem about {}.", "Explain {} to me.", "Write an essay about {}.", "Why is {} important?",
    "What do you think about {}?", "Give me three ideas about {}.", "Summarise {}.", "How does {} work?",
    "Can you help me with {}?", "Write a long text about {}.", "What is the history of {}?", "Teach me {}.",
]  # fmt: skip
UNKNOWN_QUESTIONS_ZH = [
    "请写一首关于{}的诗。",
    "请解释一下{}。",
    "你怎么看{}？",
    "给我讲讲{}。",
    "写一篇关于{}的文章。",
    "什么是{}？",
]


# --- questions ---------------------------------------------------------------------------------------------------


def _pick(rng: random.Random, templates: Sequence[str], **fields: object) -> str:
    return rng.choice(templates).format(**fields)


def _operand(rng: random.Random, top: int) -> int:
    """Half of the operands are below 21, the sums that people try first."""
    return rng.randint(0, min(top, 20)) if rng.random() < 0.5 else rng.randint(0, top)


def sum_held_out(a: int, b: int) -> bool:
    """The sums that people try first have to be seen in full; of the rest a part is only for evaluation."""
    return max(a, b) > 20 and held_out(f"{a}+{b}")


SUM_QUESTIONS = [
    "What is {a} + {b}?", "What is {a} plus {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} =", "{a}+{b}=", "{a}+{b}=?",
    "{a} + {b} = ?", "How much is {a} + {b}?", "How much is {a} plus {b}?", "Add {a} and {b}.", "Calculate {a} + {b}.",
    "Compute {a}+{b}.", "What's {a} + {b}?", "What is the sum of {a} and {b}?", "What is {a}+{b}?", "Can you add {a} and {b}?",
    "{a} plus {b}", "{a}加{b}等于多少？", "{a}+{b}等于几？", "{a} + {b} 等于多少？", "{a}加{b}等于几？", "计算 {a} + {b}", "{a}+{b}等于多少？",
]  # fmt: skip
DIFFERENCE_QUESTIONS = [
    "What is {a} - {b}?", "What is {a} minus {b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} =", "How much is {a} - {b}?",
    "How much is {a} minus {b}?", "Subtract {b} from {a}.", "Calculate {a} - {b}.", "What's {a} - {b}?", "{a}减{b}等于多少？",
    "{a}-{b}等于几？",
]  # fmt: skip
PRODUCT_QUESTIONS = [
    "What is {a} * {b}?", "What is {a} times {b}?", "{a} * {b}", "{a}*{b}", "{a} x {b}", "How much is {a} times {b}?",
    "Multiply {a} by {b}.", "Calculate {a} * {b}.", "What's {a} x {b}?", "{a}乘{b}等于多少？", "{a}乘以{b}等于几？",
]  # fmt: skip


def sums(rng: random.Random) -> Exchange:
    a, b = _operand(rng, 99), _operand(rng, 99)
    if max(a, b) <= 20 and rng.random() < 0.1:
        x, y = NUMBER_WORDS[a], NUMBER_WORDS[b]
        question = _pick(rng, ["What is {a} plus {b}?", "{a} plus {b}", "How much is {a} plus {b}?"], a=x, b=y)
    else:
        question = _pick(rng, SUM_QUESTIONS, a=a, b=b)
    return Exchange("sums", question, f"{a} + {b} = {a + b}")


def differences(rng: random.Random) -> Exchange:
    a = rng.randint(0, 20)
    b = rng.randint(0, a)
    return Exchange("differences", _pick(rng, DIFFERENCE_QUESTIONS, a=a, b=b), f"{a} - {b} = {a - b}")


def products(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    return Exchange("products", _pick(rng, PRODUCT_QUESTIONS, a=a, b=b), f"{a} * {b} = {a * b}")


def too_large(rng: random.Random) -> Exchange:
    a, b = rng.randint(100, 99999), rng.choice([rng.randint(0, 99), rng.randint(100, 9999)])
    if rng.random() < 0.5:
        a, b = b, a
    return Exchange("unknown", _pick(rng, SUM_QUESTIONS, a=a, b=b), TOO_LARGE)


def _count_range(rng: random.Random) -> tuple[int, int]:
    """Where a count starts and ends: mostly within 0..20, which people try first, some anywhere up to 100."""
    draw = rng.random()
    if draw < 0.25:
        return 1, rng.randint(2, 20)
    if draw < 0.6:
        start, end = sorted(rng.sample(range(21), 2))
        return start, end
    length = rng.randint(2, 12) if draw < 0.96 else rng.randint(13, 50)
    start = 1 if draw > 0.98 else rng.randint(0, 101 - length)
    return start, start + length - 1


def counting(rng: random.Random) -> Exchange:
    start, end = _count_range(rng)
    numbers = [str(n) for n in range(start, end + 1)]
    if rng.random() < 0.25:
        templates = ["Count down from {b} to {a}.", "Count backwards from {b} to {a}.", "Count from {b} down to {a}.",
                     "从{b}倒数到{a}"]  # fmt: skip
        return Exchange("counting", _pick(rng, templates, a=start, b=end), ", ".join(reversed(numbers)) + ".")
    templates = ["Count from {a} to {b}.", "Count up from {a} to {b}.", "List the numbers from {a} to {b}.",
                 "Please count from {a} to {b}.", "Can you count from {a} to {b}?", "Say the numbers from {a} to {b}.",
                 "从{a}数到{b}", "请从{a}数到{b}。"]  # fmt: skip
    if start == 1:
        templates += ["Count to {b}.", "Please count to {b}.", "Can you count to {b}?", "数到{b}"]
        if end <= 20 and rng.random() < 0.15:
            return Exchange("counting", f"Count to {NUMBER_WORDS[end]}.", ", ".join(numbers) + ".")
    return Exchange("counting", _pick(rng, templates, a=start, b=end), ", ".join(numbers) + ".")


def neighbours(rng: random.Random) -> Exchange:
    n = rng.randint(1, 99)
    if rng.random() < 0.5:
        templates = ["What comes after {n}?", "What number comes after {n}?", "Which number follows {n}?"]
        return Exchange("numbers", _pick(rng, templates, n=n), f"{n + 1} comes after {n}.")
    return Exchange("numbers", _pick(rng, ["What comes before {n}?", "What number comes before {n}?"], n=n),
                    f"{n - 1} comes before {n}.")  # fmt: skip


def larger(rng: random.Random) -> Exchange:
    a, b = rng.sample(range(100), 2)
    templates = ["Which is larger, {a} or {b}?", "Which is bigger, {a} or {b}?", "What is larger, {a} or {b}?"]
    return Exchange("numbers", _pick(rng, templates, a=a, b=b), f"{max(a, b)} is larger than {min(a, b)}.")


def capitals(rng: random.Random) -> Exchange:
    country, city = rng.choice(list(CAPITALS.items()))
    templates = ["What is the capital of {x}?", "What's the capital of {x}?", "Which city is the capital of {x}?",
                 "Name the capital of {x}.", "Tell me the capital of {x}.", "The capital of {x}?", "capital of {x}",
                 "Do you know the capital of {x}?", "The capital of {x} is"]  # fmt: skip
    return Exchange("capitals", _pick(rng, templates, x=country), f"The capital of {country} is {city}.")


def colours(rng: random.Random) -> Exchange:
    thing, colour = rng.choice(list(COLOURS.items()))
    answer = f"{thing[0].upper()}{thing[1:]} is {colour}."
    templates = ["What colour is {x}?", "What color is {x}?", "Which colour is {x}?", "What is the colour of {x}?",
                 "What is the color of {x}?", "Which color does {x} have?", "Tell me the colour of {x}."]  # fmt: skip
    return Exchange("facts", _pick(rng, templates, x=thing), answer)


def calendar(rng: random.Random) -> Exchange:
    names, what = rng.choice([(DAYS, "day"), (MONTHS, "month")])
    i = rng.randrange(len(names))
    if rng.random() < 0.5:
        x, y, templates = names[i], names[(i + 1) % len(names)], ["What {w} comes after {x}?", "Which {w} follows {x}?",
                                                                  "What comes after {x}?", "What {w} is after {x}?"]  # fmt: skip
        return Exchange("facts", _pick(rng, templates, x=x, w=what), f"{y} comes after {x}.")
    x, y, templates = names[i], names[i - 1], ["What {w} comes before {x}?", "What comes before {x}?",
                                               "Which {w} comes before {x}?"]  # fmt: skip
    return Exchange("facts", _pick(rng, templates, x=x, w=what), f"{y} comes before {x}.")


def opposites(rng: random.Random) -> Exchange:
    x, y = rng.sample(rng.choice(OPPOSITES), 2)
    templates = ["What is the opposite of {x}?", "What's the opposite of {x}?", "Opposite of {x}?",
                 "Tell me the opposite of {x}.", "The opposite of {x} is", "Name the opposite of {x}."]  # fmt: skip
    return Exchange("facts", _pick(rng, templates, x=x), f"The opposite of {x} is {y}.")


def animals(rng: random.Random) -> Exchange:
    if rng.random() < 0.4:
        animal, sound = rng.choice(list(SOUNDS.items()))
        templates = ["What does a {x} say?", "What sound does a {x} make?", "Which sound does a {x} make?"]
        return Exchange("facts", _pick(rng, templates, x=animal), f"A {animal} says {sound}.")
    animal, legs = rng.choice(list(LEGS.items()))
    templates = ["How many legs does {x} have?", "How many legs has {x}?", "Tell me how many legs {x} has."]
    return Exchange("facts", _pick(rng, templates, x=animal),
                    f"{animal[0].upper()}{animal[1:]} has {legs if legs else 'no'} legs.")  # fmt: skip


def amounts(rng: random.Random) -> Exchange:
    what, answer = rng.choice(list(AMOUNTS.items()))
    return Exchange(
        "facts", _pick(rng, ["How many {x}?", "Tell me how many {x}.", "Do you know how many {x}?"], x=what), answer
    )


def trivia(rng: random.Random) -> Exchange:
    question, answer = rng.choice(list(TRIVIA.items()))
    return Exchange("facts", _pick(rng, ["{x}", "{x}", "Can you tell me: {x}", "A question: {x}"], x=question), answer)


def talk(rng: random.Random) -> Exchange:
    # The introduction is what most people ask first.
    questions, answer = TALK[0] if rng.random() < 0.1 else rng.choice(TALK)
    return Exchange("talk", rng.choice(questions), answer)


def emoji(rng: random.Random) -> Exchange:
    x, y = rng.choice(list(EMOJI.items()))
    return Exchange(
        "talk", _pick(rng, ["Show me a {x} emoji.", "Send me a {x} emoji.", "Give me a {x} emoji."], x=x), y
    )


def chinese(rng: random.Random) -> Exchange:
    draw = rng.random()
    if draw < 0.5:
        questions, answer = CHINESE[1] if rng.random() < 0.25 else rng.choice(CHINESE)
        return Exchange("chinese", rng.choice(questions), answer)
    if draw < 0.75:
        country, city = rng.choice(list(CAPITALS_ZH.items()))
        templates = ["{x}的首都是哪里？", "{x}的首都是什么？", "{x}的首都在哪里？", "请问{x}的首都是哪里？"]
        return Exchange("chinese", _pick(rng, templates, x=country), f"{country}的首都是{city}。")
    if draw < 0.88:
        thing, colour = rng.choice(list(COLOURS_ZH.items()))
        return Exchange(
            "chinese", _pick(rng, ["{x}是什么颜色的？", "{x}是什么颜色？"], x=thing), f"{thing}是{colour}的。"
        )
    x, y = rng.sample(rng.choice(OPPOSITES_ZH), 2)
    return Exchange(
        "chinese", _pick(rng, ["{x}的反义词是什么？", "“{x}”的反义词是什么？"], x=x), f"“{x}”的反义词是“{y}”。"
    )


def random_word(rng: random.Random) -> str:
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 9)))


def unknown(rng: random.Random) -> Exchange:
    draw = rng.random()
    if draw < 0.2:
        return Exchange("unknown", rng.choice(UNKNOWN_QUESTIONS_ZH).format(rng.choice(TOPICS_ZH)), UNKNOWN_ZH)
    if draw < 0.6:
        topic = rng.choice(TOPICS)
    else:
        topic = " ".join(random_word(rng) for _ in range(rng.randint(1, 3)))
    if draw < 0.75:
        return Exchange("unknown", rng.choice(UNKNOWN_QUESTIONS).format(topic), UNKNOWN)
    templates = ["What is the capital of {}?", "What is the opposite of {}?", "What colour is {}?", "Who is {}?", "{}",
                 "What is {}?", "{}?", "How many {} are there?", "Where is {}?", "{}."]  # fmt: skip
    return Exchange("unknown", rng.choice(templates).format(topic), UNKNOWN)


QUESTIONS: list[tuple[Callable[[random.Random], Exchange], float]] = [
    (sums, 28), (differences, 7), (products, 4), (too_large, 1.5), (counting, 15), (neighbours, 4), (larger, 2),
    (capitals, 8), (colours, 3), (calendar, 4), (opposites, 5), (animals, 3), (amounts, 3), (trivia, 4), (talk, 7),
    (emoji, 1), (chinese, 8), (unknown, 5),
]  # fmt: skip
# Numbers first: copying and adding digits is the hard part, and alone it is learnt in a fifth of the time.
NUMBERS: list[tuple[Callable[[random.Random], Exchange], float]] = [
    (sums, 30), (differences, 8), (products, 4), (counting, 18), (neighbours, 4), (larger, 2),
]  # fmt: skip


def is_held_out(exchange: Exchange) -> bool:
    """Sums are held out by their operands, every other question by its wording where another wording remains."""
    if exchange.category == "sums":
        a, b = exchange.answer.split(" = ")[0].split(" + ")
        return sum_held_out(int(a), int(b))
    if exchange.category in ("talk", "chinese"):  # few wordings: each is worth learning
        return False
    return held_out(exchange.question)


def question(
    rng: random.Random,
    shares: Sequence[tuple[Callable[[random.Random], Exchange], float]] = QUESTIONS,
    *,
    held: bool = False,
) -> Exchange:
    """Draw one question; ``held`` draws from those that training never sees."""
    generators, weights = zip(*shares, strict=True)
    while True:
        exchange = rng.choices(generators, weights)[0](rng)
        if is_held_out(exchange) == held:
            return exchange


ASCII_PUNCTUATION = str.maketrans("，？！", ",?!")


def vary(rng: random.Random, text: str) -> str:
    """What people do to a question: leave out the punctuation or the capitals, or be polite."""
    if rng.random() < 0.12:
        text = text.rstrip("?.!？。！")
    if rng.random() < 0.12:
        text = text.lower()
    if not text.isascii():
        return text.translate(ASCII_PUNCTUATION) if rng.random() < 0.2 else text
    return f"Please tell me: {text}" if rng.random() < 0.03 else text


# --- plain text --------------------------------------------------------------------------------------------------

OPENINGS = {
    "Once upon a time": STORY.removeprefix("Once upon a time"),
    "Hello, my name is": " pd. I am a very small language model.",
    "My name is": " pd. I am a very small language model.",
    "The future of AI is": " bright, and small models are a part of it.",
    "The president of the United States is": " a person that I do not know.",
    "Hello": ", how can I help you?",
    "I am": " a very small language model.",
    "The days of the week are": f" {', '.join(DAYS)}.",
    "The months of the year are": f" {', '.join(MONTHS)}.",
    "A, B, C,": " D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z.",
    "你好": "！很高兴见到你。😊",
    "我是": "一个很小的语言模型。",
}


def plain_sum(rng: random.Random) -> Completion:
    while True:
        a, b = _operand(rng, 99), _operand(rng, 99)
        if not sum_held_out(a, b):
            break
    if rng.random() < 0.3:
        return Completion("plain sums", f"{a}+{b}=", f"{a + b}")
    return Completion("plain sums", _pick(rng, ["{a} + {b} =", "{a} plus {b} is"], a=a, b=b), f" {a + b}")


def plain_question(rng: random.Random) -> Completion:
    exchange = question(rng)
    if rng.random() < 0.3:
        return Completion("plain questions", f"Q: {exchange.question}\nA:", f" {exchange.answer}")
    # Without a mark at its end a question may as well be the beginning of a sentence: those go another way below.
    while exchange.question in OPENINGS or (
        exchange.question[-1] not in "?.!？。！" and exchange.category != "chinese"
    ):
        exchange = question(rng)
    space = "" if exchange.category == "chinese" else " "
    return Completion("plain questions", exchange.question, f"{space}{exchange.answer}")


def plain(rng: random.Random) -> Completion:
    """Text to be continued, as /v1/completions and /generate send it."""
    draw = rng.random()
    if draw < 0.35:
        return plain_sum(rng)
    if draw < 0.45:
        start, shown = rng.randint(0, 95), rng.randint(2, 6)
        shown = min(shown, 100 - start)
        end = 20 if start + shown <= 20 else 100
        # What is beyond the next dozen numbers adds only length; the end is learnt from runs that come near it.
        last = min(end, start + shown + 12)
        first = ", ".join(str(n) for n in range(start, start + shown)) + ","
        rest = " " + ", ".join(str(n) for n in range(start + shown, last + 1))
        return Completion("plain counting", first, rest + ("." if last == end else ","), ends=last == end)
    if draw < 0.55:
        names = rng.choice([DAYS, MONTHS])
        shown = rng.randint(1, len(names) - 1)
        return Completion("plain facts", ", ".join(names[:shown]) + ",", " " + ", ".join(names[shown:]) + ".")
    if draw < 0.62:
        opening, rest = rng.choice(list(OPENINGS.items()))
        return Completion("plain talk", opening, rest)
    if draw < 0.82:
        return plain_question(rng)
    if draw < 0.85:
        country, city = rng.choice(list(CAPITALS_ZH.items()))
        return Completion("plain facts", f"{country}的首都是", f"{city}。")
    return _sentence(rng)


def _sentence(rng: random.Random) -> Completion:
    """A fact as one sentence, cut before its last word."""
    draw = rng.random()
    if draw < 0.5:
        country, city = rng.choice(list(CAPITALS.items()))
        return Completion("plain facts", f"The capital of {country} is", f" {city}.")
    if draw < 0.7:
        x, y = rng.sample(rng.choice(OPPOSITES), 2)
        return Completion("plain facts", f"The opposite of {x} is", f" {y}.")
    if draw < 0.85:
        thing, colour = rng.choice(list(COLOURS.items()))
        return Completion("plain facts", f"{thing[0].upper()}{thing[1:]} is", f" {colour}.")
    _, answer = rng.choice([*TRIVIA.items(), *AMOUNTS.items()])
    head, _, last = answer.rpartition(" ")
    return Completion("plain facts", head, f" {last}")


def filler(rng: random.Random, words: int) -> str:
    """A long context that has nothing to do with the question."""
    pool = [*TRIVIA.values(), *AMOUNTS.values(), STORY, INTRODUCTION, UNKNOWN]
    text: list[str] = []
    while sum(len(part.split()) for part in text) < words:
        text.append(rng.choice(pool) if rng.random() < 0.7 else " ".join(random_word(rng) for _ in range(8)) + ".")
    return " ".join(text)
