/** Runs `npm run setup` inside the test's process, on a stand-in tenant, and reads what it says. */
import { type Options, setup } from "./setup.ts";
import { newTenant, type Tenant, type TenantSettings } from "../../support/tenant.ts";

export const SERVER_URL = "http://localhost:3000/mcp";

export interface Report {
  status: number;
  output: string;
  /** Of each setting: its mark, its step, and all that is said of it, in one line. */
  lines: { mark: string; step: string; said: string }[];
  /** The waits that it asked for, in seconds. */
  waited: number[];
}

/** `--apply --yes` */
export const APPLY = { apply: true, yes: true };

export async function runSetup(
  tenant: Tenant,
  options: Options = {},
  { serverUrl = SERVER_URL, env = {}, ask }: {
    serverUrl?: string;
    env?: Record<string, string>;
    ask?: (question: string) => Promise<boolean>;
  } = {},
): Promise<Report> {
  const printed: string[] = [];
  const waited: number[] = [];
  const token = await tenant.signManagementToken();
  const status = await setup(
    { AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: serverUrl, AUTH0_MANAGEMENT_TOKEN: token, ...env },
    options,
    (text) => printed.push(text),
    ask,
    (milliseconds) => Promise.resolve(waited.push(milliseconds / 1_000)),
  );
  const output = printed.join("\n");
  const lines = [...output.matchAll(/^(ok|to do|by hand|done) +Step (\w+) +(.*(?:\n {18}.*)*)/gm)];
  return {
    status,
    output,
    lines: lines.map(([, mark = "", step = "", said = ""]) => ({ mark, step, said: said.replace(/\n +/g, " ") })),
    waited,
  };
}

/** The settings that are left to do: mark, step and name. */
export function left({ lines }: Report): string[] {
  return lines.filter(({ mark }) => mark === "to do" || mark === "by hand")
    .map(({ mark, step, said }) => `${mark}: ${step} ${said.split(":", 1)[0]}`);
}

/** Gives a running tenant new settings, since starting another takes longer. */
export function reset(tenant: Tenant, settings: Partial<TenantSettings> = {}): Tenant {
  const { settings: now } = tenant;
  delete now.actions;
  delete now.flow;
  Object.assign(now, newTenant(settings.kind ?? "permissive"), settings);
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
