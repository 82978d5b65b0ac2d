/** Prints a line for each check, and collects what is missing. A check passes what it has read to later ones. */
import { clean, type Print } from "../command.ts";

/** What a check says, and what it passes to later checks. */
export interface Finding<T> {
  said: string;
  given: T;
  /** Hidden in everything that is printed from now on. */
  secrets?: (string | undefined)[];
  /** Neither ok nor missing, since others may not be stopped by it: later checks go on. */
  isUnclear?: boolean;
}

/** What an earlier check has passed on. Throws `CannotTell` where that has failed. */
export type Given<T> = () => T;

/** Neither ok nor missing: an earlier check has failed, or the answer cannot be seen from outside. */
export class CannotTell extends Error {}

/** The first if its check has passed it on, otherwise the second. */
export function either<T>(one: Given<T>, other: Given<T>): Given<T> {
  return () => {
    try {
      return one();
    } catch {
      return other();
    }
  };
}

/** Auth0's messages that lead to another step than the check's own. Each is quoted in the README's troubleshooting. */
const CAUSES: [words: RegExp, step: string, remedy: string][] = [
  [/You reached the limit of entities of this type for this tenant/, "2b", "Delete what attempts have left"],
  [/Unknown client/, "2b", "Import the client's document"],
  [/Callback URL mismatch/, "5", "Allow this callback in the application"],
  [/no connections enabled for the client/, "3", "Promote a connection to domain level"],
  [/Service not found(?=: MCP_SERVER_URL(?!\S))/, "1", "Create an API with this Identifier"],
  // Another audience than MCP_SERVER_URL, so it comes from the tenant.
  [/Service not found/, "2", "The Default Audience must equal MCP_SERVER_URL"],
  [
    /The userinfo audience is not allowed for third party clients/,
    "2",
    "Set Default Audience or Compatibility Profile",
  ],
  [/is not authorized to access resource server/, "1", "Set the Default Permissions"],
];

/** The README describes the remedy under the heading, or without one under the step. */
export type Check = [step: string, what: string, remedy?: string, heading?: string];

const remedyOf = ([step, , remedy, heading = `Step ${step}`]: Check) => `${remedy}. README, "${heading}"`;

/** What is missing. Checks with the same remedy, or the same message, have one cause and are counted once. */
interface Missing {
  step: string;
  what: string;
  cause: string;
}

export class Findings {
  readonly missing: Missing[] = [];
  readonly #serverUrl: string;
  readonly #print: Print;
  readonly #secrets = new Set<string>();
  #settings: Missing[] = [];

  constructor(serverUrl: string, print: Print) {
    this.#serverUrl = serverUrl;
    this.#print = print;
  }

  readonly #clean = (text: string): string => clean(text, this.#secrets);

  hide(...secrets: (string | undefined)[]): void {
    for (const secret of secrets) if (secret) this.#secrets.add(secret);
  }

  readonly print = (text: string): void => this.#print(this.#clean(text));

  /** From now on, a check that fails at a step whose setting is missing already is explained by that setting. */
  explainByWhatIsMissing(): void {
    this.#settings = [...this.missing];
  }

  /**
   * Performs a check and prints its line.
   *
   * @param run Throws what is missing, or `CannotTell`.
   */
  readonly check = async <T = never>(
    check: Check,
    run: () => string | Finding<T> | Promise<string | Finding<T>>,
  ): Promise<Given<T>> => {
    const [step, what] = check;
    const nothing = () => {
      throw new CannotTell(`not checked, since it needs "${what}"`);
    };
    try {
      const finding = await run();
      if (typeof finding === "string") {
        this.#printLine("ok", step, `${what}: ${finding}`);
        return nothing;
      }
      const { said, given, secrets = [], isUnclear = false } = finding;
      this.hide(...secrets);
      if (!isUnclear) this.#printLine("ok", step, `${what}: ${said}`);
      else if (this.#findCause(said)) throw new Error(said);
      else this.#printLine("cannot tell", step, `${what}: ${this.#clean(said).slice(0, 700)}\n${remedyOf(check)}`);
      return () => given;
    } catch (error) {
      this.#fail(check, error);
      return nothing;
    }
  };

  #fail(check: Check, error: unknown): void {
    const [step, what] = check;
    const message = this.#clean(`${what}: ${error instanceof Error ? error.message : error}`);
    const said = message.slice(0, 700); // after #clean, which would not find half a secret
    const known = this.#findCause(message);
    if (error instanceof CannotTell && !known) return this.#printLine("cannot tell", step, said);
    const named = /README Step (\w+)/.exec(said)?.[1] ?? known?.[0] ?? step; // as auth.ts says it
    const cause = known?.[2] ?? said;
    const earlier = this.missing.find((one) => one.cause === cause) ?? this.#settings.find((one) => one.step === named);
    if (earlier) return this.#printLine("cannot tell", named, `${said}\nAs above at "${earlier.what}"`);
    this.missing.push({ step: named, what, cause });
    this.#printLine("missing", named, `${said}\n${remedyOf(known ?? check)}`);
  }

  #findCause(said: string): Check | undefined {
    for (const [words, step, remedy] of CAUSES) {
      const [heading] = words.exec(said.replaceAll(this.#serverUrl, "MCP_SERVER_URL")) ?? [];
      if (heading !== undefined) return [step, "", remedy, heading];
    }
    return undefined;
  }

  #printLine(status: string, step: string, text: string): void {
    this.print(`${status.padEnd(13)}Step ${step.padEnd(2)} ${text.replaceAll("\n", `\n${" ".repeat(21)}`)}`);
  }
}
