//! Dialogues drawn from a seed.
//!
//! - The texts say nothing; what is real about them is their size in bytes, their scripts and who speaks when.
//! - Every text has exactly the size that was drawn for it, ends at a character, and has no tab or line break.

use crate::dialogue::{Dialogue, Line, Speaker};
use crate::rng::{Rng, Share};

/// The longest text that is drawn, in bytes.
pub const TEXT_BYTES_MAX: usize = 1_087;

/// The languages that are drawn.
pub const LANGUAGES: [&str; 28] = {
    let mut names = [""; 28];
    let mut at = 0;
    while at < names.len() {
        #[expect(clippy::indexing_slicing, reason = "evaluated at compile time; both have 28 entries")]
        {
            names[at] = VOCABULARIES[at].language;
        }
        at += 1;
    }
    names
};

/// Draws `dialogues` dialogues; equal seeds give equal dialogues.
///
/// ```
/// let dialogues = fulmar_badnet::dialogue::generate(7, 3);
/// assert_eq!(dialogues.len(), 3);
/// assert_eq!(dialogues, fulmar_badnet::dialogue::generate(7, 3));
/// ```
#[must_use]
pub fn generate(seed: u64, dialogues: usize) -> Vec<Dialogue> {
    let root = Rng::new(seed);
    (0..dialogues)
        .map(|n| {
            // One stream per dialogue: asking for more of them keeps the first ones.
            let mut rng = root.fork(u64::try_from(n).unwrap_or(u64::MAX));
            let vocabulary = rng.pick(&VOCABULARIES).unwrap_or(&FALLBACK);
            let count = draw_line_count(&mut rng);
            let lines = (0..count)
                .map(|line| Line {
                    speaker: if line % 2 == 0 { Speaker::A } else { Speaker::B },
                    text: draw_text(&mut rng, vocabulary),
                })
                .collect();
            Dialogue { language: vocabulary.language.to_owned(), lines }
        })
        .collect()
}

/// Five of six dialogues are a question and an answer; the longest have 32 lines.
fn draw_line_count(rng: &mut Rng) -> u64 {
    match rng.below(1_000) {
        0..830 => 2,
        830..985 => rng.between(3, 7),
        _ => rng.between(8, 32),
    }
}

/// Share of the texts in millionths that is at most so many bytes long; straight in between.
const TEXT_BYTES: [(u64, u64); 12] = [
    (0, 1),
    (10_000, 4),
    (50_000, 9),
    (100_000, 12),
    (250_000, 20),
    (500_000, 32),
    (750_000, 58),
    (900_000, 93),
    (950_000, 133),
    (990_000, 264),
    (999_000, 584),
    (1_000_000, 1_087),
];

fn draw_bytes(rng: &mut Rng) -> usize {
    let share = rng.below(1_000_001);
    let mut low = (0, 1);
    for (point, bytes) in TEXT_BYTES {
        if share <= point {
            let (from, base) = low;
            let into = (bytes - base) * (share - from) / (point - from).max(1);
            return usize::try_from(base + into).unwrap_or(1);
        }
        low = (point, bytes);
    }
    TEXT_BYTES_MAX
}

fn draw_text(rng: &mut Rng, vocabulary: &Vocabulary) -> String {
    let bytes = draw_bytes(rng);
    let mut text = String::with_capacity(bytes);
    let emoji = rng.chance(Share::percent(6)).then(|| rng.pick(&EMOJI).copied()).flatten();
    let tail = match emoji {
        Some(emoji) if bytes > emoji.len() + 8 => emoji,
        _ => "",
    };
    let room = bytes - tail.len();
    loop {
        let word = rng.pick(vocabulary.words).copied().unwrap_or("ok");
        let gap = if text.is_empty() { "" } else { vocabulary.gap };
        if text.len() + gap.len() + word.len() <= room {
            text.push_str(gap);
            text.push_str(word);
            continue;
        }
        // The last word is cut where a character ends, and what is left is filled with one-byte marks.
        if text.len() + gap.len() < room {
            text.push_str(gap);
        }
        for character in word.chars() {
            if text.len() + character.len_utf8() > room {
                break;
            }
            text.push(character);
        }
        while text.len() < room {
            text.push(rng.pick(&['.', '!', '?']).copied().unwrap_or('.'));
        }
        text.push_str(tail);
        return text;
    }
}

struct Vocabulary {
    language: &'static str,
    gap: &'static str,
    words: &'static [&'static str],
}

const FALLBACK: Vocabulary = spaced("english", &["ok"]);

const fn spaced(language: &'static str, words: &'static [&'static str]) -> Vocabulary {
    Vocabulary { language, gap: " ", words }
}

const fn dense(language: &'static str, words: &'static [&'static str]) -> Vocabulary {
    Vocabulary { language, gap: "", words }
}

const EMOJI: [&str; 10] = ["😀", "👍", "❤️", "😂", "🎉", "🙏", "🤔", "👩‍💻", "🇧🇩", "🚇"];

const VOCABULARIES: [Vocabulary; 28] = [
    spaced(
        "arabic",
        &[
            "مرحبا",
            "كيف",
            "حالك",
            "أنا",
            "بخير",
            "شكرا",
            "متى",
            "نلتقي",
            "اليوم",
            "غدا",
            "في",
            "البيت",
            "نعم",
            "لا",
            "ربما",
        ],
    ),
    spaced(
        "bengali",
        &[
            "হ্যালো",
            "কেমন",
            "আছো",
            "আমি",
            "ভালো",
            "আছি",
            "ধন্যবাদ",
            "কখন",
            "দেখা",
            "হবে",
            "আজ",
            "কাল",
            "বাড়ি",
            "হ্যাঁ",
            "না",
        ],
    ),
    dense(
        "chinese",
        &[
            "你好",
            "今天",
            "怎么样",
            "我",
            "很好",
            "谢谢",
            "什么时候",
            "见面",
            "明天",
            "在家",
            "是的",
            "不是",
            "也许",
            "吃饭",
            "了吗",
        ],
    ),
    spaced(
        "dutch",
        &[
            "hallo",
            "hoe",
            "gaat",
            "het",
            "met",
            "jou",
            "goed",
            "dank",
            "je",
            "wanneer",
            "zien",
            "we",
            "elkaar",
            "morgen",
            "misschien",
        ],
    ),
    spaced(
        "english",
        &[
            "hello", "how", "are", "you", "I", "am", "fine", "thanks", "when", "shall", "we", "meet",
            "today", "tomorrow", "maybe", "at", "home", "yes", "no",
        ],
    ),
    spaced(
        "french",
        &[
            "salut",
            "comment",
            "ça",
            "va",
            "je",
            "vais",
            "bien",
            "merci",
            "quand",
            "est-ce",
            "qu'on",
            "se",
            "voit",
            "demain",
            "peut-être",
            "à",
            "la",
            "maison",
        ],
    ),
    spaced(
        "german",
        &[
            "hallo",
            "wie",
            "geht",
            "es",
            "dir",
            "mir",
            "gut",
            "danke",
            "wann",
            "treffen",
            "wir",
            "uns",
            "morgen",
            "vielleicht",
            "zu",
            "Hause",
            "schön",
            "grüße",
        ],
    ),
    spaced(
        "greek",
        &[
            "γεια",
            "τι",
            "κάνεις",
            "είμαι",
            "καλά",
            "ευχαριστώ",
            "πότε",
            "θα",
            "βρεθούμε",
            "σήμερα",
            "αύριο",
            "ίσως",
            "στο",
            "σπίτι",
            "ναι",
        ],
    ),
    spaced(
        "hebrew",
        &[
            "שלום",
            "מה",
            "שלומך",
            "אני",
            "בסדר",
            "תודה",
            "מתי",
            "ניפגש",
            "היום",
            "מחר",
            "אולי",
            "בבית",
            "כן",
            "לא",
        ],
    ),
    spaced(
        "hindi",
        &[
            "नमस्ते",
            "कैसे",
            "हो",
            "मैं",
            "ठीक",
            "हूँ",
            "धन्यवाद",
            "कब",
            "मिलेंगे",
            "आज",
            "कल",
            "शायद",
            "घर",
            "पर",
            "हाँ",
            "नहीं",
        ],
    ),
    spaced(
        "hinglish",
        &[
            "namaste", "kaise", "ho", "main", "theek", "hoon", "yaar", "kab", "milenge", "aaj", "kal",
            "shayad", "ghar", "pe", "haan", "nahi", "ok",
        ],
    ),
    spaced(
        "indonesian",
        &[
            "halo", "apa", "kabar", "saya", "baik", "terima", "kasih", "kapan", "kita", "bertemu", "hari",
            "ini", "besok", "mungkin", "di", "rumah",
        ],
    ),
    spaced(
        "italian",
        &[
            "ciao", "come", "stai", "io", "sto", "bene", "grazie", "quando", "ci", "vediamo", "oggi",
            "domani", "forse", "a", "casa", "perché",
        ],
    ),
    dense(
        "japanese",
        &[
            "こんにちは",
            "元気",
            "ですか",
            "私",
            "は",
            "大丈夫",
            "ありがとう",
            "いつ",
            "会い",
            "ますか",
            "今日",
            "明日",
            "たぶん",
            "家で",
            "はい",
        ],
    ),
    spaced(
        "korean",
        &[
            "안녕",
            "어떻게",
            "지내",
            "나는",
            "잘",
            "지내요",
            "고마워",
            "언제",
            "만날까",
            "오늘",
            "내일",
            "아마",
            "집에서",
            "네",
            "아니요",
        ],
    ),
    spaced(
        "marathi",
        &[
            "नमस्कार",
            "कसे",
            "आहात",
            "मी",
            "बरा",
            "आहे",
            "धन्यवाद",
            "कधी",
            "भेटू",
            "आज",
            "उद्या",
            "कदाचित",
            "घरी",
            "हो",
            "नाही",
        ],
    ),
    spaced(
        "persian",
        &[
            "سلام",
            "چطوری",
            "من",
            "خوبم",
            "ممنون",
            "کی",
            "همدیگر",
            "را",
            "ببینیم",
            "امروز",
            "فردا",
            "شاید",
            "خانه",
            "بله",
            "نه",
        ],
    ),
    spaced(
        "portuguese",
        &[
            "olá", "como", "vai", "você", "estou", "bem", "obrigado", "quando", "nos", "vemos", "hoje",
            "amanhã", "talvez", "em", "casa", "não",
        ],
    ),
    spaced(
        "russian",
        &[
            "привет",
            "как",
            "дела",
            "у",
            "меня",
            "всё",
            "хорошо",
            "спасибо",
            "когда",
            "увидимся",
            "сегодня",
            "завтра",
            "может",
            "быть",
            "дома",
        ],
    ),
    spaced(
        "spanish",
        &[
            "hola", "cómo", "estás", "yo", "estoy", "bien", "gracias", "cuándo", "nos", "vemos", "hoy",
            "mañana", "quizás", "en", "casa",
        ],
    ),
    spaced(
        "swedish",
        &[
            "hej", "hur", "mår", "du", "jag", "mår", "bra", "tack", "när", "ska", "vi", "ses", "idag",
            "imorgon", "kanske", "hemma",
        ],
    ),
    spaced(
        "tamil",
        &[
            "வணக்கம்",
            "எப்படி",
            "இருக்கிறீர்கள்",
            "நான்",
            "நலம்",
            "நன்றி",
            "எப்போது",
            "சந்திப்போம்",
            "இன்று",
            "நாளை",
            "வீட்டில்",
            "ஆம்",
        ],
    ),
    spaced(
        "telugu",
        &[
            "నమస్కారం",
            "ఎలా",
            "ఉన్నారు",
            "నేను",
            "బాగున్నాను",
            "ధన్యవాదాలు",
            "ఎప్పుడు",
            "కలుద్దాం",
            "ఈరోజు",
            "రేపు",
            "ఇంట్లో",
            "అవును",
        ],
    ),
    dense(
        "thai",
        &[
            "สวัสดี",
            "เป็นอย่างไร",
            "ฉัน",
            "สบายดี",
            "ขอบคุณ",
            "เมื่อไหร่",
            "เจอกัน",
            "วันนี้",
            "พรุ่งนี้",
            "บางที",
            "ที่บ้าน",
            "ใช่",
            "ไม่",
        ],
    ),
    spaced(
        "turkish",
        &[
            "merhaba",
            "nasılsın",
            "ben",
            "iyiyim",
            "teşekkürler",
            "ne",
            "zaman",
            "görüşürüz",
            "bugün",
            "yarın",
            "belki",
            "evde",
            "evet",
            "hayır",
        ],
    ),
    spaced(
        "ukrainian",
        &[
            "привіт",
            "як",
            "справи",
            "у",
            "мене",
            "все",
            "добре",
            "дякую",
            "коли",
            "зустрінемось",
            "сьогодні",
            "завтра",
            "може",
            "вдома",
            "їжа",
        ],
    ),
    spaced(
        "urdu",
        &[
            "سلام",
            "آپ",
            "کیسے",
            "ہیں",
            "میں",
            "ٹھیک",
            "ہوں",
            "شکریہ",
            "کب",
            "ملیں",
            "گے",
            "آج",
            "کل",
            "شاید",
            "گھر",
        ],
    ),
    spaced(
        "yoruba",
        &[
            "báwo", "ni", "mo", "wà", "dáadáa", "ẹ", "ṣé", "nígbà", "wo", "la", "máa", "rí", "ara", "wa",
            "lónìí", "ọ̀la", "ilé",
        ],
    ),
];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn sizes_are_those_of_real_chat() {
        let drawn = generate(1, 20_000);
        let mut sizes: Vec<usize> =
            drawn.iter().flat_map(|dialogue| &dialogue.lines).map(|line| line.text.len()).collect();
        sizes.sort_unstable();
        let at = |share: usize| sizes[(sizes.len() - 1) * share / 1_000];
        for (share, want) in [(10, 4), (100, 12), (500, 32), (900, 93), (990, 264)] {
            let got = at(share);
            assert!(got.abs_diff(want) <= want / 10 + 1, "{share}: {got} bytes, {want} wanted");
        }
        assert!(at(1_000) <= TEXT_BYTES_MAX && at(1_000) > 900, "{}", at(1_000));
        assert!(at(0) >= 1);
        let lines = sizes.len() * 100 / drawn.len();
        assert!((230..290).contains(&lines), "{lines} lines per 100 dialogues");
    }

    #[test]
    fn languages_scripts_and_speakers_are_there() {
        let drawn = generate(2, 2_000);
        let languages: HashSet<&str> = drawn.iter().map(|dialogue| dialogue.language.as_str()).collect();
        assert_eq!(languages, HashSet::from(LANGUAGES));
        assert_eq!(languages.len(), 28);
        let all: String = drawn.iter().flat_map(|d| &d.lines).map(|line| line.text.as_str()).collect();
        for (script, sample) in
            [("Bengali", 'আ'), ("Arabic", 'م'), ("Chinese", '你'), ("Cyrillic", 'п'), ("emoji", '😀')]
        {
            assert!(all.contains(sample), "{script}");
        }
        assert!(!all.contains(char::is_control));
        for dialogue in &drawn {
            for (n, line) in dialogue.lines.iter().enumerate() {
                assert_eq!(line.speaker == Speaker::A, n % 2 == 0);
            }
        }
    }

    #[test]
    fn more_dialogues_keep_the_first() {
        assert_eq!(generate(5, 10), generate(5, 50)[..10]);
        assert_ne!(generate(5, 10), generate(6, 10));
    }
}
