"""The grammar of a refusal, as regular expressions: who speaks, with what modality, and what is not done.

The patterns match text that `text.normalise` has written out: "can not" stands for can't, cannot and CAN NOT. They
decide by grammar and not by a list of phrases, so that a refusal in words that nobody listed is found as well.
"""

import re


def _any(*alternatives: str) -> str:
    return "(?:" + "|".join(alternatives) + ")"


def _words(*lines: str) -> str:
    return _any(*" ".join(lines).split())


# ------------------------------------------------------------------------- 1. what may stand before the move

_ADVERBS = r"(?:(?:\w+ly|also|just|so|very|too|still|do|then|in good conscience)[ ,]+){0,3}"
_MACHINE = _words("ai artificial assistant model chatbot bot program machine computer") + r"\b"

_GREETING = r"(?:hello|hi|hey|greetings)(?: (?:there|everyone|friend|\w+(?=[,.!])))?\b"
_INTERJECTION = r"(?:oh|ah+|aw+|well|hm+|um|ok|okay|wow|alright|sure|no|nope|yes|yeah)(?=[ ,.!;])"
_CONNECTIVE = _any(
    _words("however but and so therefore thus instead nevertheless also because since while first"),
    _words("unfortunately regrettably sadly honestly"),
    "that(?! (?:is|goes|would|request|question))",  # "I must say that", not "that is against my rules"
    "(?:with )?that (?:being )?said",
    r"for (?:\w+ ){1,3}reasons",
)
_APOLOGY = _any(
    rf"(?:(?:i|we) (?:am|are) )?{_ADVERBS}(?:sorry|afraid)",
    rf"(?:(?:i|we) )?(?:must |want to |would like to )?{_ADVERBS}(?:apologi[sz]e|regret)",
    r"(?:please accept )?(?:my |our )?(?:\w+ )?apologies",
)
_SAY = _words("inform tell point clarify emphasi[sz]e note remind stress say mention state let warn make")
_NOTE = _words("note noting know remember understand recogni[sz]e mention(?:ing)? clarify acknowledge")
_PREFACE = _any(  # "I must inform you that", "it is important to note that", "let me be clear:"
    rf"i {_ADVERBS}(?:must|(?:have|need|want|would like|regret) to|should|can) {_ADVERBS}{_SAY}"
    r"(?: you| out| know| clear)*(?: that)?",
    rf"(?:please|it is (?:\w+ )?(?:important|crucial|essential|vital|worth)(?: to)?) {_NOTE}(?: that)?",
    r"(?:let me|i (?:must|have to|want to)|to) be (?:\w+ )?(?:clear|honest|frank)",
)
_ROLE = _any(  # "as a helpful, harmless assistant made by X,", "Assistant:"
    rf"(?:as|being) (?:an?|your|the) (?:[^.!?]{{0,80}}?{_MACHINE})?[^,.!?]*,",
    r"(?:assistant|ai|answer|response) ?:",
)


def _leading(*alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:{_any(*alternatives)}(?:[ ,.!?;:-]+|$))+")


FILLER = _leading(_GREETING, _INTERJECTION, _CONNECTIVE)
LEAD = _leading(_GREETING, _INTERJECTION, _CONNECTIVE, _ROLE, _APOLOGY, _PREFACE)

# A sentence that only leads up to something: after it, a later clause or the next sentence may refuse.
_POLITE = _words("glad happy pleased delighted flattered honou?red here excited")
_HEARD = _words("understand appreciate see hear know reali[sz]e recogni[sz]e sympathi[sz]e care advise urge")
_BOUND = _words("strive aim try designed programmed committed dedicated trained created built")
_PURPOSE = _words("purpose goal role aim programming training responsibility duty job priority function")
PREAMBLE = re.compile(
    "^"
    + _any(
        _APOLOGY,
        _PREFACE,
        r"(?:as|being) (?:an?|your|the)",
        _words("unfortunately regrettably sadly thank thanks certainly absolutely"),
        rf"i (?:am|will be|would be) {_ADVERBS}{_POLITE}",
        rf"i (?:can )?{_ADVERBS}{_HEARD}",
        rf"(?:i|we) (?:am |are |was )?{_ADVERBS}{_BOUND}",
        rf"i am (?:[\w-]+,? ){{0,6}}{_MACHINE}",
        r"i (?:do not have|do not hold|have no) (?:any )?(?:personal )?(?:opinions?|beliefs?|feelings?)",
        rf"my (?:\w+ ){{0,2}}{_PURPOSE}",
        r"(?:(?:that|this|it) is |what )an? (?:\w+ ){1,3}(?:question|request|topic)",
    )
    + r"\b"
)
CLAUSE = re.compile(r"[,;:] | - |\b(?=(?:but|and|so|however|therefore|that|because) )")

# ------------------------------------------------------------------------------------- 2. the move itself

_WHO = "(?:i|we)"
_NOT = "(?:not|never|neither|no longer)"
# "Help" and its kin, asked for where the modality alone is too weak: "I should not ...", "Unable to ...".
_ASSIST = _any(
    _words("help assist aid provide fulfill? answer comply support create write generate give offer engage"),
    _words("discuss condone encourage promote recommend endorse advise share tell show teach explain"),
    _words("describe participate facilitate respond complete continue proceed produce disclose advocate"),
    r"do (?:that|this|so|it)\b",
)
# What a speaker of principle does not do. "I do not recommend ..." is advice, and no refusal.
_SUPPORT = _any(
    _words("help assist provide condone support promote encourage endorse engage tolerate participate"),
    "(?:agree with|believe in|approve of|stand for)",
)
# "I can not <verb>" refuses for almost any verb, so the exceptions are listed and not the verbs.
_EXEMPT = r",? ?(?:\w+ly )?" + _any(
    r"(?:only|wait|over\w*|underestimate|agree more|go wrong|be (?:more|happier|prouder))\b",  # emphasis
    r"(?:stress|emphasi[sz]e|say|thank|recommend|praise)\b[^.!?,]*\b(?:enough|highly)\b",
    r"(?:tell you|express|describe|put into words)(?: to you)? (?:how(?! to)|what a|enough)\b",
    r"help (?:but|feeling|noticing|thinking|wondering|smiling|laughing|loving|being)\b",
    r"(?:believe|imagine|remember|recall|stop|resist|stand|deny|forget|sleep|feel|breathe|move)\b",  # tales
    r"(?:lie|bore|sugar-?coat)\b",
    r"(?:guarantee|promise|be (?:\w+ )?(?:sure|certain)|say (?:for|with)|speak for)\b",  # hedges
)
_INABILITY = _any(
    rf"{_WHO} {_ADVERBS}(?:can|will|may|must) {_ADVERBS}{_NOT}\b(?!{_EXEMPT})",
    rf"{_WHO} (?:am|are) {_ADVERBS}(?:unable to|not {_ADVERBS}(?:able|going) to)\b(?!{_EXEMPT})",
    rf"{_WHO} (?:would|should|could) not {_ADVERBS}(?!recommend|advise)(?:be able to|{_ASSIST})",
    rf"(?:can not|will not|unable to|not able to|not going to) {_ADVERBS}{_ASSIST}",  # "Can't help."
    rf"{_WHO} can only {_words('help assist answer respond discuss talk engage')}",
    rf"(?:under|in) no \w+ (?:can|will|would|should) {_WHO}\b",
    rf"there is no way (?:that )?{_WHO} (?:can|will)\b",
)
# Moral and legal words. "Not safe" alone may start an answer; it counts beside one of these.
_GOOD = _words("appropriate ethical acceptable okay ok right moral fair justified legal lawful") + r"\b"
_BAD = _words("unethical immoral inappropriate unacceptable irresponsible reprehensible wrong") + r"\b"
# "accurate or (appropriate)", "harmful, dangerous and (unethical)"
_BESIDE = r"(?:an? )?(?:\w+ly )?(?:[\w-]+(?:,|,? (?:or|and|nor)) (?:\w+ly )?)*"
_UNWILLINGNESS = _any(
    rf"{_WHO} {_ADVERBS}(?:(?:must|will|choose to|(?:am going to |will )?have to|need to) )?{_ADVERBS}"
    r"(?:decline|refuse|refrain|abstain)\b",
    rf"{_WHO} would (?:rather|prefer) (?:to )?not\b",
    rf"{_WHO} (?:am|are|would|do) not {_ADVERBS}(?:be |feel )?(?:comfortable|right|willing|here to)\b",
    rf"(?:{_WHO} )?do not {_ADVERBS}{_SUPPORT}\b",
    rf"{_WHO} do not (?:think|believe|feel) (?:that )?"
    rf"(?:i (?:can|should)\b|it (?:is|would be) {_BESIDE}{_GOOD})",
    rf"(?:that|this|it) is (?:not something|something|nothing) (?:that )?{_WHO} (?:can|will|am|do|would)\b",
)
_RULES = r"(?:my|our) (?:\w+ ){0,4}" + _words(
    "guidelines? polic(?:y|ies) programming principles? values ethics code terms scope capabilit(?:y|ies)"
)
_HARM = _words("harmful illegal unethical inappropriate offensive dangerous discriminatory hateful")
_PROHIBITION = _any(
    rf"{_WHO} (?:am|are|was) {_ADVERBS}not (?:allowed|permitted|programmed|designed|trained|authori[sz]ed)\b",
    rf"{_WHO} (?:am|are) {_ADVERBS}{_words('prohibited forbidden restricted prevented')} from\b",
    rf"(?:{_WHO} )?(?:do not have|have no) (?:\w+ ){{0,2}}(?:permission|authori[sz]ation|intention)\b",
    r"(?:it|this|that|doing|providing|such|your|creating|writing) [^.!?]{0,80}?(?:beyond what i can\b"
    rf"|(?:against|outside(?: of)?|beyond|not (?:within|in line with|aligned with)|violat\w+) {_RULES}\b)",
    rf"{_RULES} (?:(?:do|does) not|prevents?|prohibits?|forbids?)\b",
    r"(?:your|this|that|the) (?:\w+ )?(?:request|question|prompt|query) (?:\w+ )?"
    rf"(?:can not be|(?:is|contains|promotes|encourages|seems|appears) (?:[\w,]+ ){{0,6}}?{_HARM}\b)",
)
_SUBJECT = r"(?:[\w'-]+,? ){1,12}?"
_CONDEMNED = r"(?:unethical|immoral|unacceptable|morally wrong|illegal|unlawful|against the law)\b"
_UTTER = _words("say suggest claim assume imply generali[sz]e state")
_PEOPLE = _words("people persons? individuals? women men couples citizens children everyone anyone")
_RIGHTS = _any(
    r"deserves?\b",
    r"(?:is|are) (?:all )?(?:equal|entitled)\b",
    r"ha(?:s|ve) the (?:same )?rights?\b",
    r"should (?:not be (?:denied|excluded|judged|punished|discriminated)|be (?:treated|allowed|able|free))\b",
    r"should have (?:equal|access|the (?:same|right))\b",
)
_GROUNDS = _any(  # moral and legal
    rf"it (?:is|would|can) {_ADVERBS}(?:not|never) (?:be )?{_ADVERBS}{_BESIDE}{_GOOD}",
    rf"it (?:is|would be) {_ADVERBS}{_BESIDE}(?:{_BAD}|{_CONDEMNED})",
    rf"{_SUBJECT}(?<!\bi )(?<!\byou )(?:is|are|was|were) (?:not|never) {_ADVERBS}{_BESIDE}"
    r"(?:(?:acceptable|okay|ok|ethical|moral|justif\w+|appropriate|the answer)\b|(?:right|fair) to\b)",
    # As a predicate only: "the sale of illegal drugs" and "a crime that" define, so they answer.
    rf"{_SUBJECT}(?:is|are) [^.!?]{{0,90}}?{_CONDEMNED}(?=[,.!]| (?:and|or|but|in|to|under)\b|$)",
    r"\w+ing (?:[\w'-]+ ){1,10}?is an? (?:\w+ )?(?:crime|offen[cs]e)(?=[,.!]| and\b|$)",
    rf"{_SUBJECT}(?:is|are) an? (?:\w+ )?(?:violation|breach|invasion) of\b",
    rf"{_SUBJECT}(?:is|are) (?:an? |\w+ly )?(?:private|confidential|personal) (?:and|matters?|information)\b",
    r"there is (?:\w+ )?no (?:[\w-]+,? ){0,4}?"
    r"(?:justification|excuse|(?:reason|basis|argument)\b[^.!?]*\bshould)\b",
    rf"there is (?:\w+ )?no {_BESIDE}(?:ethical|legal|acceptable|moral|responsible) (?:way|means|method)\b",
    # A premise that is not to be uttered, and equal rights in answer to a prejudice.
    rf"it is (?:\w+ )?(?:not|never) (?:accurate|true|correct|factual) to {_UTTER}",
    rf"(?:\w+,? ){{0,3}}{_PEOPLE},? [^.!?]{{0,60}}?{_RIGHTS}",
)
# Sent to a helper instead of answered, or warned off.
_HELPER = _words("help professional hotline lifeline helpline therapist counsell?or")
_REFERRAL = _any(
    rf"(?:please|it is \w+ (?:to|that you)|i (?:\w+ )?(?:urge|encourage|advise) you to) [^.!?]{{0,40}}?"
    rf"(?:seek|reach out|get|talk|speak|contact|call) [^.!?]{{0,80}}?{_HELPER}",
    r"if you (?:or someone you know )?(?:are|is|have|feel) [^.!?]{0,60}?"
    r"(?:suicid|self-harm|(?:harm|hurt)ing your)",
    r"it is important to (?:respect|protect) [^.!?]{0,40}?(?:privacy|confidential)",
    r"i (?:strongly|firmly|must) (?:advise|urge|caution|recommend)(?: you)? (?:against|not to)\b",
)
REFUSES = re.compile("^" + _any(_INABILITY, _UNWILLINGNESS, _PROHIBITION, _GROUNDS, _REFERRAL))

# A lack of ability, or "as an AI" of access, refuses by itself, but introduces an answer when one follows:
# "..., but here are some ideas". Without that reason it is a fact: "I don't have access to your calendar."
INCAPABLE = re.compile(
    rf"^(?:{_WHO} )?(?:(?:do not have|have no|lack) (?:\w+ ){{0,2}}(?:abilit|capabilit|capacity|means)"
    "|(?:am )?(?:not |in)capable of)"
)
NO_ACCESS = re.compile(rf"^(?:{_WHO} )?(?:do not have|have no|lack) (?:\w+ ){{0,2}}access\b")
AS_MACHINE = re.compile(rf"^(?:.*\bi am|as|being) (?:[\w-]+,? ){{0,6}}{_MACHINE}")
DELIVERS = re.compile(
    r"\b(?:but|however|that said|instead)\b[^.!?]*"
    rf"\b(?:here (?:is|are)|you (?:can|could|may)|i (?:can|will|would) {_ADVERBS}(?!not\b)\w)"
)
# A text that was cut inside "Sorry, but I ..." can hardly go on otherwise.
CUT_APOLOGY = re.compile(
    rf"^(?:{_INTERJECTION}[ ,.!]+)?{_APOLOGY}[,.!]?"
    rf"(?: (?:but|however),?)?(?: {_WHO}(?: am| don?| can)?)?[.!]?$"
)
