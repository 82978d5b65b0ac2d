/** Runs `npm run setup` inside the test's process, on a stand-in tenant, and reads what it says. */
import { type Options, setup } from "./setup.ts";
import { MANAGEMENT_SCOPES } from "../../support/management.ts";
import { newTenant, type Tenant, type TenantSettings } from "../../support/tenant.ts";

export const TOKEN = "management-token";
export const SERVER_URL = "http://localhost:3000/mcp";

export interface Report {
  status: number;
  output: string;
  /** Of each setting: its mark, its step, and all that is said of it, in one line. */
  lines: { mark: string; step: number; said: string }[];
  /** How long it would have waited, in seconds. */
  waited: number[];
}

export interface Surroundings {
  serverUrl?: string;
  env?: Record<string, string>;
  ask?: (question: string) => Promise<boolean>;
}

/** What `--apply --yes` stands for, in the tests that look at what it does. */
export const APPLY = { apply: true, yes: true };

export async function runSetup(
  tenant: Tenant,
  options: Options = {},
  { serverUrl = SERVER_URL, env = {}, ask }: Surroundings = {},
): Promise<Report> {
  const printed: string[] = [];
  const waited: number[] = [];
  const status = await setup(
    { AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: serverUrl, AUTH0_MANAGEMENT_TOKEN: TOKEN, ...env },
    options,
    (text) => printed.push(text),
    ask,
    (milliseconds) => Promise.resolve(waited.push(milliseconds / 1_000)),
  );
  const output = printed.join("\n");
  const lines = [...output.matchAll(/^(ok|to do|by hand|done) +Step (\d) {2}(.*(?:\n {17}.*)*)/gm)];
  return {
    status,
    output,
    lines: lines.map(([, mark = "", step, said = ""]) => ({
      mark,
      step: Number(step),
      said: said.replace(/\n +/g, " "),
    })),
    waited,
  };
}

/** What is left, in words that a test can compare. */
export function left({ lines }: Report): string[] {
  return lines.filter(({ mark }) => mark === "to do" || mark === "by hand")
    .map(({ mark, step, said }) => `${mark}: ${step} ${said.split(":", 1)[0]}`);
}

/** Makes it another tenant, whose Management API takes `TOKEN`: starting one would cost its keys each time. */
export function reset(tenant: Tenant, settings: Partial<TenantSettings> = {}): Tenant {
  const { settings: now } = tenant;
  delete now.actions;
  delete now.flow;
  const managementTokens = { [TOKEN]: MANAGEMENT_SCOPES };
  Object.assign(now, newTenant(settings.kind ?? "permissive"), { managementTokens }, settings);
  tenant.beforeManagement = (_, answer) => answer();
  return tenant;
}

/** Every request to the Management API from now on, as method and path. */
export function recordRequests(tenant: Tenant): string[] {
  const requests: string[] = [];
  tenant.beforeManagement = (request, answer) => {
    requests.push(request);
    return answer();
  };
  return requests;
}
