# SPDX-License-Identifier: Apache-2.0
"""The words of `data.tasks`: no logic.

None of them asks for what ``examples/prompts/unseen.jsonl`` asks for, the kinds of
prompts that a drafter is measured on and never trained on: an explanation, an
extraction, a fable, a recipe or SQL.
"""

CODE = (
    "Add comments to this code:\n\n{text}",
    "Write a docstring or a header comment for this code.\n\n{text}",
    "Find the mistake in this code, if there is one, and correct it.\n\n{text}",
    "Review this code and name what could go wrong.\n\n{text}",
    "Write a test for this code:\n\n{text}",
    "{text}\n\nWrite unit tests for the code above.",
    "Make this code easier to read without changing what it does.\n\n{text}",
    "Rename the variables in this code so that they are clearer:\n\n{text}",
)
# Languages of code blocks, as their fences name them.
CODE_LANGUAGES = frozenset(
    {
        "bash", "c", "cpp", "csharp", "css", "dart", "go", "html", "java", "javascript",
        "js", "jsx", "kotlin", "lua", "perl", "php", "powershell", "py", "python", "r",
        "ruby", "rust", "scala", "scss", "sh", "swift", "ts", "tsx", "typescript",
    }
)  # fmt: skip

REWRITING = (
    "Make this text shorter:\n\n{text}",
    "Rewrite this in a more formal tone:\n\n{text}",
    "Rewrite this in a friendlier tone:\n\n{text}",
    "Turn this paragraph into a short e-mail to a colleague:\n\n{text}",
    "Rephrase the following without repeating its wording:\n\n{text}",
    "Make this paragraph more persuasive:\n\n{text}",
    "Cut this text to half its length and keep what matters.\n\n{text}",
    "Edit this paragraph for clarity and flow:\n\n{text}",
    "Turn this into a post for social media:\n\n{text}",
)

TRANSLATION = (
    "Translate this into {language}:\n\n{text}",
    "{text}\n\nTranslate the paragraph above into {language}.",
    "How would one say this in {language}?\n\n{text}",
    "Please give me a {language} translation of this text:\n\n{text}",
)
LANGUAGES = (
    "Spanish", "French", "German", "Italian", "Portuguese", "Dutch", "Polish",
    "Swedish", "Turkish", "Russian", "Chinese", "Japanese", "Korean", "Hindi",
)  # fmt: skip

ROLEPLAY = (
    "You are {persona}. Stay in character and answer this: {text}",
    "Play the role of {persona}. {text}",
    "I want you to act as {persona}. My first question is: {text}",
    "Answer as {persona} would: {text}",
    "Pretend to be {persona} for this conversation. {text}",
)
PERSONAS = (
    "a pirate captain", "a Victorian butler", "a football commentator",
    "a medieval knight", "a cheerful robot", "a stern librarian",
    "a detective in the 1920s", "a patient kindergarten teacher",
    "a retired sea captain", "a stand-up comedian", "a Roman senator",
    "a travel guide in Lisbon", "a doctor in a small village", "a sceptical scientist",
    "a fitness coach", "an astronaut on her way to Mars", "a grumpy taxi driver",
    "a fortune teller at a fair", "a young start-up founder", "a radio host",
    "a gardener with forty years of experience", "a museum curator",
    "a mountain guide", "an old wizard",
)  # fmt: skip

PASSAGE = (
    "{text}\n\nWhat does the passage say about {topic}?",
    "Read this passage:\n\n{text}\n\nAccording to it, what is said about {topic}?",
    "Answer from the passage alone. What do we learn about {topic}?\n\n{text}",
    "Passage: {text}\n\nQuestion: What is the role of {topic} here?\nAnswer:",
    "Use the text below to answer: where does {topic} come up in it?\n\n{text}",
)

# A text, and the numbers to draw for it: lowest and highest.
MATHS: tuple[tuple[str, dict[str, tuple[int, int]]], ...] = (
    ("What is {a} + {b}?", {"a": (11, 9999), "b": (11, 9999)}),
    ("What is {a} - {b}? Show the steps.", {"a": (500, 9999), "b": (11, 499)}),
    ("Calculate {a} x {b}.", {"a": (12, 99), "b": (12, 99)}),
    ("Divide {a} by {b} and give the remainder.", {"a": (200, 9999), "b": (3, 19)}),
    ("What is {a}% of {b}?", {"a": (3, 95), "b": (40, 4000)}),
    ("Solve for x: {a}x + {b} = {c}", {"a": (2, 12), "b": (1, 40), "c": (41, 200)}),
    (
        "Solve the equations x + y = {a} and x - y = {b}.",
        {"a": (20, 90), "b": (2, 18)},
    ),
    ("Find the roots of x^2 - {a}x + {b} = 0.", {"a": (5, 20), "b": (1, 20)}),
    ("Simplify the fraction {a}/{b}.", {"a": (6, 120), "b": (121, 360)}),
    (
        "What is {a}/{b} + {c}/{d}?",
        {"a": (1, 9), "b": (2, 12), "c": (1, 9), "d": (2, 12)},
    ),
    (
        "What is the greatest common divisor of {a} and {b}?",
        {"a": (24, 400), "b": (24, 400)},
    ),
    ("Is {a} a prime number? Why or why not?", {"a": (101, 1999)}),
    ("Write {a} in binary.", {"a": (17, 1023)}),
    (
        "What is the derivative of {a}x^{b} + {c}x?",
        {"a": (2, 12), "b": (2, 7), "c": (2, 30)},
    ),
    (
        "A train travels {a} km in {b} hours. What is its average speed?",
        {"a": (90, 900), "b": (2, 9)},
    ),
    (
        "A shirt costs {a} dollars and is reduced by {b}%. What is the new price?",
        {"a": (20, 120), "b": (5, 60)},
    ),
    (
        (
            "Maya has {a} marbles. She gives {b} to her brother and buys {c} more. "
            "How many does she have now?"
        ),
        {"a": (40, 90), "b": (3, 35), "c": (4, 40)},
    ),
    (
        "A rectangle is {a} m long and {b} m wide. What are its area and perimeter?",
        {"a": (5, 60), "b": (2, 40)},
    ),
    (
        (
            "A tank holds {a} litres. A pump fills {b} litres a minute. How long "
            "does it take to fill the tank?"
        ),
        {"a": (200, 5000), "b": (8, 60)},
    ),
    (
        "{a} pencils cost {b} cents. How much do {c} pencils cost?",
        {"a": (3, 12), "b": (60, 600), "c": (13, 40)},
    ),
    (
        (
            "A worker earns {a} dollars an hour and works {b} hours a week. What does "
            "she earn in {c} weeks?"
        ),
        {"a": (12, 45), "b": (15, 42), "c": (2, 12)},
    ),
    (
        (
            "The sum of two numbers is {a}, and one is {b} more than the other. "
            "What are the numbers?"
        ),
        {"a": (60, 300), "b": (4, 50)},
    ),
    (
        (
            "A bag has {a} red and {b} blue balls. Two are drawn, and none put back. "
            "What is the probability that both are red?"
        ),
        {"a": (3, 15), "b": (3, 15)},
    ),
    (
        (
            "Two cyclists start {a} km apart and ride towards each other at {b} "
            "and {c} km/h. When do they meet?"
        ),
        {"a": (30, 240), "b": (12, 24), "c": (14, 30)},
    ),
    (
        "Find the mean and the median of {a}, {b}, {c}, {d} and {e}.",
        {"a": (1, 60), "b": (1, 60), "c": (1, 60), "d": (1, 60), "e": (1, 60)},
    ),
    (
        "A school has {a} pupils, and {b}% of them come by bus. How many do not?",
        {"a": (200, 1500), "b": (10, 80)},
    ),
    (
        (
            "What is term number {b} of the arithmetic sequence that starts at {a} and "
            "goes up by {c}?"
        ),
        {"a": (1, 30), "b": (20, 90), "c": (2, 15)},
    ),
)
