// The words of the panels, in the editor's language where it is one of ours.

const CHINESE = {
  "Run to see what each guidance does": "运行后显示每个引导项的作用",
  sum: "总和",
  fight: "相反",
  agree: "一致",
  off: "未启用",
  weight: "权重",
  pull: "强度",
  cosine: "余弦",
  "step {0} of {1}, sigma {2}": "第 {0}/{1} 步，sigma {2}",
  "measured from {0}": "以 {0} 为基准",
  ", measured from {0}": "，以 {0} 为基准",
  "{0} guidance": "{0} 个引导项",
  "{0} guidances": "{0} 个引导项",
  "line {0}": "第 {0} 行",
  "The weight over the sampling, from pure noise (left) to the image (right)": "采样过程中的权重：左为纯噪声，右为图像",
};

let words = {};

/** Take the language of the editor's settings. */
export function useLanguage(app) {
  words = app.extensionManager?.setting?.get?.("Comfy.Locale") === "zh" ? CHINESE : {};
}

/** A text in the user's language, with {0}, {1} ... filled in. */
export function say(text, ...values) {
  return (words[text] ?? text).replace(/\{(\d)\}/g, (_, place) => values[place]);
}
