"""The text that the demo works on."""

from __future__ import annotations

# For the embeddings: of very different lengths, so that padding matters.
SENTENCES = (
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun by the window.",
    "Interest rates were raised by a quarter of a point on Thursday.",
    "The central bank tightened its policy again this week.",
    "Rain.",
    "Heavy showers are expected over the western hills tonight, easing towards the morning.",
    "How do I reset the password of my account?",
    "I cannot log in any more and need new credentials, because I have forgotten the old ones.",
    "Trains to the coast leave every half hour from platform four.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "Plants make their food from sunlight.",
    "Our flight was cancelled, so we spent the night at the airport and learned a card game.",
)
# Pairs of the above whose similarity a reader can judge.
PAIRS = ((0, 1), (2, 3), (6, 7), (0, 2), (8, 9))

# For the training steps: 1 is content, 0 is not.
REVIEWS = (
    ("The room was spotless and the staff could not have been kinder.", 1),
    ("It broke on the second day and nobody answers my letters.", 0),
    ("By far the best soup that I have had this winter.", 1),
    ("Two hours of my life that I will not get back.", 0),
    ("Arrived early, fits perfectly, does what it says.", 1),
    ("The sound crackles and the battery is empty by noon.", 0),
    ("My daughter has read it three times already.", 1),
    ("Overpriced, noisy and cold.", 0),
    ("A small shop with a big heart; I will be back.", 1),
    ("The instructions are missing half of the steps.", 0),
    ("Clear pictures, quiet fan, happy owner.", 1),
    ("The colour came off in the first wash.", 0),
    ("They even carried the sofa up to the fifth floor.", 1),
    ("I waited a month for the wrong size.", 0),
    ("Funny, warm and over too soon.", 1),
    ("The app crashes whenever I open the map.", 0),
)
