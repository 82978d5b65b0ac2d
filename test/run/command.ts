/** What all commands share. Each is a function for its tests, and runs where its file is the main program. */
import { realpathSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { parseArgs, type ParseArgsConfig } from "node:util";

/** Takes a line, or several. */
export type Print = (text: string) => void;

/** Replaces secrets and control characters, since texts come from outside. */
export function clean(text: string, secrets: Iterable<string>): string {
  const hidden = [...secrets].filter(Boolean).reduce((rest, secret) => rest.replaceAll(secret, "(hidden)"), text);
  return hidden.replace(/[^\P{Cc}\n]/gu, "?");
}

type OptionsConfig = NonNullable<ParseArgsConfig["options"]>;

/**
 * Reads the options after `npm run … --`.
 *
 * @returns Nothing where `--help` is among them, which prints the help.
 * @throws {Error} With a line for the user, where an option is unknown or lacks its value.
 */
export function readOptions<const T extends OptionsConfig>(args: string[], options: T, help: string, print: Print) {
  if (args.includes("--help")) {
    print(help);
    return undefined;
  }
  try {
    return parseArgs({ args, options }).values;
  } catch (error) {
    const [said] = String(error instanceof Error ? error.message : error).split(/\. |\n/, 1); // without Node's advice
    throw new TypeError(`${said}: --help shows the options`);
  }
}

/** The value of an option that takes one of several words. */
export function oneOf<Word extends string>(option: string, value: string, words: readonly Word[]): Word {
  const word = words.find((one) => one === value);
  if (word === undefined) throw new Error(`${option} must be ${words.join(" or ")}`);
  return word;
}

/**
 * Runs a command where its file is the main program. An error is printed as one line, with exit status 1.
 *
 * @param moduleUrl The file's `import.meta.url`.
 * @param main Returns the exit status.
 */
export async function runCommand(
  moduleUrl: string,
  main: (args: string[], print: Print) => Promise<number>,
): Promise<void> {
  const [, script, ...args] = process.argv;
  if (script === undefined || realpathSync(script) !== fileURLToPath(moduleUrl)) return;
  // A reader that stops early, such as `| head`, must not end this process with a stack trace.
  process.stdout.on("error", () => {});
  process.exitCode = await main(args, console.log).catch((error: unknown) => {
    console.error(error instanceof Error ? error.message : error);
    return 1;
  });
}
